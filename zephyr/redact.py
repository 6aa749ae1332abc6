"""Taking secrets out of a configuration before it is saved or uploaded."""

import re
from typing import Any

REMOVED = "<removed>"

_SECRET = re.compile(r"(?:^|_)(?:api_?key|access_?key|secret|password)(?:_|$)")
_TOKEN = re.compile(r"(?:^|_)token$")
_USER_INFO = re.compile(r"(?<=://)[^/\s?#]+@")


def redact(config: Any) -> Any:
    """A copy in which the literal value of every secret key, and the user-info of every URL, is replaced.

    A key is secret by a whole word (snake_case, kebab-case or camelCase): api_key, access_key, secret,
    password, or token at its end. Kept are tokens of a vocabulary (`cls_token: "[CLS]"`, `eos_token:
    "</s>"`), numbers and switches (`num_tokens`, `add_bos_token`), empty values, and what only names the
    place of a secret: `${...}` and keys that end in `_env` or `_file`.
    """
    if isinstance(config, dict):
        return {key: REMOVED if _is_secret(key, value) else redact(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    if isinstance(config, str):
        return _USER_INFO.sub(f"{REMOVED}@", config)
    return config


def _is_secret(key: Any, value: Any) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", str(key)).lower()
    if words.endswith(("_env", "_file")) or value in (None, "") or isinstance(value, bool | dict):
        return False
    text = str(value)
    if _TOKEN.search(words):
        return isinstance(value, str | list) and not text.startswith(("${", "<", "["))
    return bool(_SECRET.search(words)) and not text.startswith("${")
