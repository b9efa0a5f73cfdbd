"""A report as a reader has it: its texts, tables, links and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

from hones_lens.app.report.report import write_report
from hones_lens.app.report.run_view import RunView

VOID = {"meta", "link", "img", "br", "input"}


@dataclass
class Page(HTMLParser):
    """Texts, tables, links and ids of a page; a tag that is not closed in order raises."""

    texts: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.style = ""

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if "style" in self.open:
            self.style += data
            return
        self.texts.append(data)
        if self.open and any(tag in self.open for tag in ("td", "th")):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def table(self, *columns: str) -> list[list[str]]:
        """Rows of the one table whose heading starts with these columns."""
        (found,) = [t for t in self.tables if t and t[0][: len(columns)] == list(columns)]
        return [[cell.strip() for cell in row] for row in found[1:]]


def written(tmp_path, *runs: RunView) -> tuple[str, Page]:
    source = write_report(tmp_path / "deep" / "report.html", runs).read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert not page.open
    return source, page


def value(text: str) -> float:
    return float(text.replace("−", "-").rstrip(" %"))
