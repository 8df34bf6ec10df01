"""The tables that lab.gpu measures, as JSON while it runs and as Markdown at its end."""

from pathlib import Path

from checkpoints.files import write_json
from lab.findings import markdown


class Report:
    """The tables of one part, in a JSON file that is always complete."""

    def __init__(self, path: Path):
        self.path = path
        self.tables: list[dict] = []

    def add(self, title: str, heads: list[str], rows: list[list[str]]) -> None:
        self.tables.append({"title": title, "heads": heads, "rows": rows})
        write_json(self.path, self.tables)


def page(results: dict) -> str:
    """The report as Markdown."""
    lines = ["# One GPU", "", results["machine"], ""]
    for name, part in results["parts"].items():
        lines += [f"## {name}", "", f"{part['seconds']} s with start and loading.", ""]
        if part["failure"]:
            lines += [f"Not finished: {part['failure']}", ""]
        for table in part["tables"]:
            lines += [f"{table['title']}:", "", markdown(table["heads"], table["rows"]), ""]
    return "\n".join(lines)
