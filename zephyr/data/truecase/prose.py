"""What in a message is prose: the stretches whose letters must stay as they are, and where sentences begin."""

import re

# Stretches that are no prose. Each alternative begins with a rare character or is anchored, so that a search is cheap.
_KEPT = re.compile(
    r"""
      ^[ \t]*(?P<fence>```+|~~~+).*?(?:^[ \t]*(?P=fence)|\Z)           # fenced code, closed or not
    | ```.*?(?:```|\Z)
    | `[^`\n]*`
    | \$\$.*?\$\$ | \\\(.*?\\\) | \\\[.*?\\\]                          # LaTeX
    | \\begin\{(?P<environment>[^}\n]*)\}.*?\\end\{(?P=environment)\}
    | \$(?=\S)[^$\n]{1,200}(?<=\S)\$(?!\d)
    | \\[A-Za-z]+(?:\{[^{}\n]*\})*
    | <(?:script|style|pre|code)\b.*?(?:</(?:script|style|pre|code)>|\Z)
    | </?[A-Za-z!][^<>\n]*>                                            # tags of HTML
    | \b(?:https?|ftp|file)://\S+ | \bwww\.\S+ | \bmailto:\S+
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                                     # e-mail addresses
    | (?<!\w)[@\#][\w-]+ | (?<![\w-])--?[A-Za-z][\w-]*                 # handles, tags, flags
    | (?<![\w])(?:~|\.{1,2})?(?:/[\w.@%+-]+)+/? | \b[A-Za-z]:\\\S+     # paths
    | \b[\w-]+(?:/[\w.-]+){2,} | \b[\w-]+/[\w-]+\.\w+
    | \b\w*(?:_\w+)+\b | \b\w+_\b                                      # names in programs
    | \b\w+(?:\.\w+)+\b(?:\(\))? | \b\w+(?:::\w+)+ | \b\w+\(\) | \b\w+\[\w*\]
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_HINTS = re.compile(r"[`$\\<@#_]|/\w|\w[(\[:]\S|\w\.\w|(?:^|[\s(])--?[A-Za-z]|~~~", re.MULTILINE)

_CODE_LINE = re.compile(
    r"""^[ ]{4,}\S | ^\t+\S | [;{}\\]\s*$ | =>|==|!=|\+=|-=|&&|\|\||->|<-|::|(?-i:\b[a-z])\+\+
      | (?<=\s)[:<>]?=(?=\s)
      | ^\s*(?:\$\s|>>>|//|/\*|\*/|\#!|\#include|<\?|%|@\w) | ^\s*\w+\(.*\)\s*:?\s*$ | ^\s*[\w.-]+=\S
      | ^\s*(?:sudo|npm|npx|pip3?|git|docker|kubectl|apt|apt-get|brew|curl|wget|yarn|cd|ls|mkdir|chmod|ssh|cargo|rm)
        \s+(?:[-./~\w]*[-./~]\S*|install|add|run|commit|push|pull|clone|init|update|build|start|status|get|apply)\b
      | ^\s*(?:def|class|elif|import|from)\s+[\w.]+(?:\s+import\b|\s+as\b|\(.*|:|)\s*$ | \|[^|]*\| | ^\s*git\s+[a-z-]+\b
      | ^\s*for\s+\w+\s+in\s+\S+[:(] | ^\s*select\s+\*|\bselect\b.+\bfrom\b.+\bwhere\b
      | ^\s*"?[\w-]+"?:\s*(?:["\[{].*,|[\w"'./-]+,?|)$
    """,
    re.VERBOSE | re.IGNORECASE,
)


_CODE_HINTS = re.compile(
    r"""[;{}\\=<>|&$%@+]|    |\t|\w\(|//|/\*|#!|,$|^\s*(?:[\w-]+"?:\s*\S+$|[a-z]+ [-./~\w]*[-./~])"""
    r"|^\s*(?:class|def|elif|for|from|import|select)\b"
    r"|\b(?:sudo|npm|npx|pip3?|git|docker|kubectl|apt|apt-get|brew|curl|wget|yarn|cargo|conda)\b",
    re.MULTILINE | re.IGNORECASE,
)


def may_hold_code(text: str) -> bool:
    """Whether any line of a text can be one that `is_code` finds."""
    return _CODE_HINTS.search(text) is not None


def kept_spans(text: str) -> list[tuple[int, int]]:
    """Stretches [start, end), in order, that are code, markup, addresses, paths, formulas or identifiers."""
    if not _HINTS.search(text):
        return []
    return [match.span() for match in _KEPT.finditer(text)]


def is_code(line: str) -> bool:
    """Whether a line (without its end) looks like a program's, a shell's or a table's rather than like prose."""
    return _CODE_LINE.search(line) is not None
