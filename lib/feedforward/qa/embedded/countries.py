"""Pages of facts on two countries each, with queries as people type them."""

import json
from collections.abc import Iterator, Mapping

from feedforward.qa.embedded.draft import Draft, choose, digest, ordered

# relation -> (sentences, queries); {n} the country, {v} the value, {d} its demonym
_RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "capital": (
        (
            "The seat of government of {n} is {v}.",
            "In {n}, parliament and ministries sit in {v}.",
            "{v} is where {n} is governed from.",
        ),
        ("capital of {q}", "what is the capital city of {q}", "{q} capital"),
    ),
    "area": (
        (
            "{n} covers {v} square kilometres.",
            "The territory of {n} extends over {v} square kilometres.",
            "On the map {n} takes up {v} square kilometres.",
        ),
        ("how big is {q}", "size of {q} in km2", "what is the area of {q}"),
    ),
    "population": (
        (
            "About {v} people live in {n}.",
            "{n} is home to {v} inhabitants.",
            "A count of those who live in {n} gave {v}.",
        ),
        ("population of {q}", "how many residents does {q} have", "number of people {q}"),
    ),
    "demonym": (
        (
            "A citizen of {n} is described as {v}.",
            "Whoever comes from {n} is {v}.",
            "The adjective that belongs to {n} is {v}.",
        ),
        ("demonym for {q}", "what do you call someone from {q}", "{q} nationality word"),
    ),
    "subregion": (
        (
            "Geographers place {n} in {v}.",
            "{n} is counted among the countries of {v}.",
            "{n} forms a part of {v}.",
        ),
        ("which part of the world is {q} in", "{q} region", "where on earth is {q}"),
    ),
    "calling": (
        (
            "Telephone numbers in {n} begin with +{v}.",
            "To ring somebody in {n}, dial {v} before the number.",
            "The prefix for telephone calls to {n} is {v}.",
        ),
        ("{q} country code", "calling code of {q}", "international dialling code {q}"),
    ),
    "domain": (
        (
            "Web sites of {n} often end in {v}.",
            "On the internet {n} uses the ending {v}.",
            "The addresses of {n} carry the suffix {v}.",
        ),
        ("top level domain of {q}", "{q} tld", "what is the internet domain for {q}"),
    ),
    "zone": (
        (
            "Clocks in {n} show {v}.",
            "In {n} the hour is that of {v}.",
            "The time of day in {n} follows {v}.",
        ),
        ("time zone {q}", "what timezone is {q} in", "{q} local time offset"),
    ),
    "native": (
        (
            "Its own inhabitants call {n} {v}.",
            "In the language of the country {n} is {v}.",
            "At home the name of {n} is {v}.",
        ),
        ("native name of {q}", "what do locals call {q}", "endonym for {q}"),
    ),
    "french": (
        ("A Parisian speaks of {n} as {v}.", "The word for {n} in French is {v}."),
        ("how do you say {q} in french", "{q} french translation", "french name for {q}"),
    ),
    "german": (
        ("In Berlin {n} goes by the name {v}.", "The word for {n} in German is {v}."),
        ("how do you say {q} in german", "{q} german translation", "german name for {q}"),
    ),
    "code": (
        (
            "The standard ISO 3166 shortens {n} to {v}.",
            "In tables {n} is abbreviated as {v}.",
            "Three letters stand for {n}: {v}.",
        ),
        ("iso code {q}", "abbreviation for {q}", "three letter code of {q}"),
    ),
    "neighbour": (
        (
            "The only land frontier of {n} is with {v}.",
            "{n} touches a single country, {v}.",
            "Whoever leaves {n} by land arrives in {v}.",
        ),
        ("countries bordering {q}", "neighbor of {q}", "which country shares a border with {q}"),
    ),
}


def _facts(country: Mapping, names: Mapping[str, str]) -> dict[str, str]:
    """What is known of a country, by relation; a value that is not a plain one is left out."""
    name = country["name"]
    translations, borders = country.get("translations") or {}, country.get("borders") or []
    only = {key: country.get(key) or [] for key in ("callingCodes", "tld", "timezones")}
    facts = {
        "capital": country.get("capital"),
        "area": f"{country['area']:,.0f}" if country.get("area") else None,
        "population": f"{country['population']:,}" if country.get("population") else None,
        "demonym": country.get("demonym"),
        "subregion": country.get("subregion"),
        "calling": only["callingCodes"][0] if len(only["callingCodes"]) == 1 else None,
        "domain": only["tld"][0] if only["tld"] else None,
        "zone": only["timezones"][0] if len(only["timezones"]) == 1 else None,
        "native": country.get("nativeName"),
        "french": translations.get("fr"),
        "german": translations.get("de"),
        "code": country["ISO"].get("alpha3"),
        "neighbour": names.get(borders[0]) if len(borders) == 1 else None,
    }
    return {
        key: value
        for key, value in facts.items()
        if isinstance(value, str)
        and value
        and (key in ("area", "population") or "," not in value)
        and len(value) < 40
        and not (key in ("native", "french", "german") and value == name)
    }


def drafts(files: Mapping[str, str]) -> Iterator[Draft]:
    """Queries on pages made of the JSON files of countries; the source is the pair of a page."""
    countries = []
    for _, text in sorted(files.items()):
        country = json.loads(text)
        if country.get("area") and country.get("ISO", {}).get("alpha3") and country.get("capital"):
            countries.append(country)
    names = {country["ISO"]["alpha3"]: country["name"] for country in countries}
    facts = {country["name"]: _facts(country, names) for country in countries}
    order = ordered((name for name in facts if len(facts[name]) >= 9), "pairs")
    for first, second in zip(order[0::2], order[1::2], strict=False):
        for version in ("a", "b", "c"):
            yield from _page((first, second), facts, version)


def _page(pair: tuple[str, str], facts: Mapping[str, Mapping], version: str) -> Iterator[Draft]:
    lines = []
    for name in pair:
        for relation in ordered(facts[name], name, version)[:9]:
            form = choose(_RELATIONS[relation][0], name, relation, version)
            lines.append((name, relation, form))
    lines.sort(key=lambda it: digest(*pair, version, it[0], it[1]))
    context, spans = "", []
    for name, relation, form in lines:
        value = facts[name][relation]
        before, _, after = form.partition("{v}")
        before, after = before.format(n=name), after.format(n=name)
        start = len(context) + len(before)
        sentence = f"{before}{value}{after}"
        context += f"{sentence} "
        spans.append((name, relation, value, start))
    context = context.rstrip()
    for name, relation, value, start in spans:
        query = choose(_RELATIONS[relation][1], name, relation, version, "query")
        yield Draft(
            relation, query.format(q=name.lower()), context, value, start, " and ".join(pair)
        )
