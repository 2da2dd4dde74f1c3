"""Hooks of MkDocs, which mkdocs.yml names: the pages, as GitHub shows them, become a site.

README.md is its first page, and a link that leaves docs/ leads to a copy of the file.
"""

import re
from pathlib import Path
from posixpath import dirname, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
BESIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Pages beside docs/, and their places in the site."""

_LINK = re.compile(r"(\]\(|src=\")([^):#\"]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages beside docs/, and the files of the repository that pages link to."""
    for name, place in BESIDE.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text()))
    for page in files.documentation_pages():
        for link in _LINK.finditer(page.content_string):
            path = _linked(page.src_uri, link[2])
            if path and _place(path) not in files.src_uris:
                files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Links between files that lie elsewhere in the site than in the repository."""
    uri = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        path = _linked(uri, link[2])
        return link[1] + relpath(_place(path), dirname(uri) or ".") if path else link[0]

    return _LINK.sub(moved, markdown)


def _linked(uri: str, target: str) -> Path | None:
    """The file of the repository that `target` names in the page `uri` of the site."""
    folder = ROOT if uri in BESIDE.values() else ROOT / "docs" / dirname(uri)
    path = (folder / target).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _place(path: Path) -> str:
    """Where a file of the repository is in the site."""
    uri = path.relative_to(ROOT).as_posix()
    return BESIDE.get(uri, uri.removeprefix("docs/"))
