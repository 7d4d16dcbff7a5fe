"""Plain text out of a Debian package: HTML, manual pages, info files and text documents."""

import gzip
import re
import subprocess
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from osdn.errors import UserError

PLACES = re.compile(
    r"^(usr/share/(doc|doc-base|gtk-doc|info|help/C|gnome/help|books|texmf/doc)/"
    r"|usr/share/man/man\d/|usr/share/doc/.*/man)"
)
LEFT_OUT = re.compile(
    r"changelog|copyright|news\b|genindex|py-modindex|/search|_sources/|-members\.html|_source\.html"
    r"|/(functions|globals|namespacemembers|classes|annotated|hierarchy|files|index-all|allclasses"
    r"|overview-tree|package-tree|package-use|deprecated-list|constant-values)[^/]*\.html|/class-use/"
    r"|(?<=[._-])(de|fr|es|it|ja|ru|pl|zh|pt|pt-br|cs|ko|zh-cn|zh-tw|ca|da|el|fi|hu|nl|sv|tr|uk|vi)"
    r"([._-]|\.html)",
    re.IGNORECASE,
)
MANUAL = re.compile(r"\.[1-9][a-z]*$")
INFO = re.compile(r"\.info(-\d+)?$")
PLAIN = (".txt", ".rst", ".md", ".text", ".asciidoc", ".adoc", ".org")
BLOCKS = frozenset(
    re.findall(
        r"\w+",
        "address article blockquote br caption center dd div dl dt figcaption footer form h1 h2 h3"
        " h4 h5 h6 header hr li main ol p pre section table tbody td th thead title tr ul",
    )
)
HIDDEN = frozenset(("script", "style", "nav", "footer", "noscript", "template", "svg", "select"))
LARGEST = 4_000_000  # bytes of a file, unpacked


def documents(package: Path) -> Iterator[tuple[str, str]]:
    """(path in the package, text) of every document in a .deb, in the order of paths.

    Raises:
        UserError: no Debian package, or no dpkg-deb on this machine.
    """
    try:
        archive = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE
        )
    except OSError as error:
        raise UserError("corpus: no dpkg-deb on this machine; build it on Debian") from error
    assert archive.stdout is not None
    found: dict[str, str] = {}
    with archive, tarfile.open(fileobj=archive.stdout, mode="r|") as files:
        for member in files:
            name = member.name.removeprefix("./")
            if not member.isreg() or not PLACES.match(name) or LEFT_OUT.search("/" + name):
                continue
            if member.size > LARGEST:
                continue
            file = files.extractfile(member)
            assert file is not None
            data = file.read()
            if name.endswith(".gz"):
                try:
                    name, data = name[:-3], gzip.decompress(data)
                except (OSError, EOFError):
                    continue  # a damaged file of theirs
            if text := plain(PurePosixPath(name), data[:LARGEST]):
                found[name] = text
    if archive.returncode:
        raise UserError(f"{package}: dpkg-deb cannot read it")
    yield from sorted(found.items())


def plain(path: PurePosixPath, data: bytes) -> str | None:
    """The text of one file by its name's ending; None for what is no document."""
    name = path.name.lower()
    if name.endswith((".html", ".htm", ".xhtml")):
        return from_html(_decode(data))
    if "/man/" in f"/{path}" and MANUAL.search(name):
        return from_roff(_decode(data))
    if name.endswith(PLAIN) or INFO.search(name) or name.startswith("readme"):
        return tidy(re.sub(r"\x1f.*", "", _decode(data)))
    return None


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text: str) -> str:
    """No control characters, no spaces at line ends, at most one empty line at a time."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "", text.replace("\r\n", "\n"))
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


class _Text(HTMLParser):
    """Collects what a page shows; spaces are kept in <pre> alone."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in HIDDEN
        self.pre += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n- " if tag == "li" else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in HIDDEN))
        self.pre = max(0, self.pre - (tag == "pre"))
        if tag in BLOCKS and tag not in ("li", "td", "th"):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def from_html(page: str) -> str:
    """What a page shows, without scripts, styles and navigation."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return tidy(re.sub(r"\n[ \t]+(?=\n)", "\n", "".join(parser.parts)))


ESCAPES = [
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[-+]?\d"), ""),
    (re.compile(r"\\\*(\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\\(em|\\\[em\]"), "--"),
    (re.compile(r"\\\((?:aq|cq|oq)|\\\[(?:aq|cq|oq)\]"), "'"),
    (re.compile(r"\\\((?:dq|lq|rq)|\\\[(?:dq|lq|rq)\]"), '"'),
    (re.compile(r"\\\(..|\\\[[^]]*\]"), ""),
    (re.compile(r"\\[&/,|^)%:!d u]"), ""),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e|\\\\"), r"\\"),
]
SECTIONS = (".SH", ".Sh", ".SS", ".Ss")
BREAKS = (".PP", ".P", ".LP", ".TP", ".IP", ".Pp", ".It", ".br", ".sp", ".RS", ".RE", ".nf", ".fi")
WORDS = re.compile(r'"[^"]*"|\S+')
NO_TEXT = re.compile(
    r"^[.'](?:\\\"|TH|de|am|ie|el|if|ds|nr|ad|hy|so|ig|tr|na|ne|in|ti|UR|Dd|Os|\.)"
)


def from_roff(source: str) -> str:
    """A manual page without its formatting: sections, paragraphs and words."""
    out: list[str] = []
    in_macro = False
    for line in source.split("\n"):
        if in_macro:
            in_macro = line.strip() != ".."
            continue
        if line[:1] in (".", "'"):
            macro, _, rest = line.partition(" ")
            if macro in (".de", ".ig", ".am"):
                in_macro = True
            words = " ".join(word.strip('"') for word in WORDS.findall(rest))
            if macro in SECTIONS:
                out.append(f"\n{_unescape(words)}\n")
            elif macro in BREAKS:
                out += ["", _unescape(words)] if macro in (".IP", ".It") else [""]
            elif not NO_TEXT.match(line) and words:
                out.append(_unescape(words))
        else:
            out.append(_unescape(line))
    return tidy("\n".join(out))


def _unescape(text: str) -> str:
    for pattern, replacement in ESCAPES:
        text = pattern.sub(replacement, text)
    return text
