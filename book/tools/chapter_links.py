"""Sphinx extension: where a docstring names a chapter or a part, the reference links to it."""

import re

_CHAPTER = re.compile(r"``book/([\w/-]+)``")


def setup(app) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", link_chapters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def link_chapters(app, what, name, thing, options, lines: list[str]) -> None:
    """Turn a chapter's name in the lines of a docstring into a link, where there is such a page."""

    def link(name: re.Match) -> str:
        pages = [page for page in (name[1], f"{name[1]}/index") if page in app.env.found_docs]
        return f":doc:`/{pages[0]}`" if pages else name[0]

    lines[:] = [_CHAPTER.sub(link, line) for line in lines]
