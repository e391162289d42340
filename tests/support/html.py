"""HTML pages, parsed without a browser: their tags and text, and what is wrong for a screen reader."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page; fails where a tag is not closed."""

    VOID = frozenset({"meta", "input", "line", "rect", "image", "img", "path"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class Names(HTMLParser):
    """Lists in `wrong` what hinders a screen reader: missing names, wrong ids, and skipped levels of headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.level = 0
        self.ids: set[str] = set()
        self.referenced: list[str] = []
        self.feed(text)
        self.wrong += [f"no element {one}" for one in self.referenced if one not in self.ids]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if (one := values.get("id")) is not None:
            if one in self.ids:
                self.wrong.append(f"two elements {one}")
            self.ids.add(one)
        self.referenced += (values.get("aria-labelledby") or "").split()
        if tag == "html" and not values.get("lang"):
            self.wrong.append("no language")
        if tag == "img" and not values.get("alt"):
            self.wrong.append("an image without an alternative text")
        if tag == "svg" and not (values.get("aria-label") or values.get("aria-hidden") == "true"):
            self.wrong.append("a drawing without a label")
        if tag == "th" and not values.get("scope"):
            self.wrong.append("a header cell without a scope")
        if tag in ("h1", "h2", "h3", "h4"):
            level = int(tag[1])
            if level > self.level + 1:
                self.wrong.append(f"{tag} after h{self.level}")
            self.level = level
