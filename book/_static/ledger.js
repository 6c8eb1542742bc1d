// Filters of the claims ledger. Without this script the whole table is shown.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table.ledger");
  if (!table) return;

  const rows = [...table.querySelectorAll("tbody tr")].map((row) => ({
    row,
    ...row.querySelector(".claim").dataset,
  }));
  const form = document.createElement("form");
  form.className = "ledger-filter";
  form.setAttribute("aria-label", "Choose claims");
  const count = document.createElement("output");
  count.setAttribute("aria-live", "polite");

  const choices = ["paper", "verdict"].map((name) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.name = name;
    select.add(new Option("all", ""));
    for (const value of new Set(rows.map((one) => one[name]))) {
      select.add(new Option(value, value));
    }
    label.append(name, select);
    form.append(label);
    return select;
  });

  const show = () => {
    const address = new URL(location.href);
    for (const select of choices) {
      if (select.value) address.searchParams.set(select.name, select.value);
      else address.searchParams.delete(select.name);
    }
    // some browsers forbid this for pages opened from a file
    try {
      history.replaceState(null, "", address);
    } catch {}
    let shown = 0;
    for (const one of rows) {
      one.row.hidden = !choices.every((s) => !s.value || s.value === one[s.name]);
      shown += !one.row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} claims`;
  };

  const reset = document.createElement("button");
  reset.type = "button";
  reset.textContent = "Show all";
  reset.addEventListener("click", () => {
    form.reset();
    show();
  });
  form.append(reset, count);
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  (table.closest(".pst-scrollable-table-container") ?? table).before(form);

  const asked = new URLSearchParams(location.search);
  for (const select of choices) {
    const value = asked.get(select.name);
    if ([...select.options].some((option) => option.value === value)) select.value = value;
  }
  // a link to a claim shows it, whatever the filters say
  if (location.hash) form.reset();
  show();
});
