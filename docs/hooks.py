"""MkDocs hooks: the pages that come from the code, and links from pages to files outside docs/.

- index.md, contributing.md and changelog.md are the repository's README, CONTRIBUTING and CHANGELOG.
- cli.md holds the help of every command.
- api/ documents the public names, in the groups of minikv_jax/__init__.pyi.
- source/ holds the files of the repository that pages link to.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pathlib
import posixpath
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from minikv_jax.cli.main import commands, main

ROOT = pathlib.Path(__file__).parents[1]
STUB = ROOT / "minikv_jax" / "__init__.pyi"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
CODE = {".py": "python", ".pyi": "python", ".cu": "cuda", ".cuh": "cuda", ".h": "cpp"}
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
SUBCOMMAND = re.compile(r"^ {4}([a-z][a-z-]*)(?: {2,}|$)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and every file of the repository that a page links to."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path, uri in PAGES.items():
        texts[path] = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=texts[path]))
    for uri, content in {"cli.md": cli_page(), **api_pages()}.items():
        files.append(File.generated(config, uri, content=content))
    for path in sorted({target for page, text in texts.items() for target in targets(page, text)}):
        if path not in PAGES and not path.startswith("docs/"):
            files.append(source_file(config, path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    origin = {uri: path for path, uri in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    directory = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        target = uri(resolve(origin, match["path"]))
        return f"]({posixpath.relpath(target, directory or '.')}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)


def resolve(page: str, link: str) -> str:
    """The path in the repository that a link on a page stands for."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def targets(page: str, text: str) -> Iterator[str]:
    """The files that a page links to."""
    for match in LINK.finditer(text):
        path = resolve(page, match["path"])
        if (ROOT / path).is_file():
            yield path


def uri(path: str) -> str:
    """The place in the site of a file of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md" if pathlib.Path(path).suffix in CODE else f"source/{path}"


def source_file(config: MkDocsConfig, path: str) -> File:
    """A page that shows a source file, or a copy of any other file."""
    language = CODE.get(pathlib.Path(path).suffix)
    if language is None:
        return File.generated(config, uri(path), abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8")
    return File.generated(config, uri(path), content=f"# {path}\n\n``````{language}\n{text}``````\n")


# The command line -----------------------------------------------------------------------------------------------------


def help_of(*command: str) -> str:
    """What `minikv COMMAND --help` prints."""
    os.environ["COLUMNS"] = "82"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue().rstrip()


def cli_page() -> str:
    """The help of every command, and of its subcommands in boxes that open."""
    parts = ["# Command line", f"```text\n{help_of()}\n```"]
    for command in commands():
        text = help_of(command.name)
        parts += [f"## minikv {command.name}", f"```text\n{text}\n```"]
        for name in SUBCOMMAND.findall(text):
            lines = ["```text", *help_of(command.name, name).splitlines(), "```"]
            parts.append("\n".join([f'??? note "minikv {command.name} {name}"', *("    " + line for line in lines)]))
    return "\n\n".join(parts) + "\n"


# The API --------------------------------------------------------------------------------------------------------------


def public_names() -> dict[str, dict[str, str]]:
    """The public names by the groups of the stub, with the place where each is defined."""
    text = STUB.read_text(encoding="utf-8")
    headings = {number: line[2:] for number, line in enumerate(text.splitlines(), 1) if re.fullmatch(r"# \w+", line)}
    groups: dict[str, dict[str, str]] = {name: {} for name in headings.values()}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.ImportFrom):
            group = groups[headings[max(line for line in headings if line < statement.lineno)]]
            group |= {alias.asname or alias.name: f"{statement.module}.{alias.name}" for alias in statement.names}
    return groups


def api_pages() -> dict[str, str]:
    """A page per group of public names, and one that lists them all."""
    groups = public_names()
    pages = {
        f"api/{group}.md": "\n\n".join([f"# {group.capitalize()}", *(f"::: {place}" for place in names.values())])
        for group, names in groups.items()
    }
    index = [
        "# API",
        "Import public names from `minikv_jax`. Each is loaded when it is first used.",
        "| group | names |\n|---|---|",
    ]
    for group, names in groups.items():
        listed = ", ".join(f"[`{name}`][{place}]" for name, place in names.items())
        index[-1] += f"\n| [{group}]({group}.md) | {listed} |"
    return pages | {"api/index.md": "\n\n".join(index) + "\n"}
