"""What a row, a message and a conversation are, and the checks that name what is wrong with one."""

from typing import Any

from zephyr.errors import UserError

Message = dict[str, str]  # role (system, user or assistant) and content
Row = tuple[str, dict[str, Any]]  # where it stands ("file.jsonl line 7"), and its columns

_ROLES = ("system", "user", "assistant")


class BadRow(UserError):
    """A row that cannot be used: where it stands, what is wrong with it, how to mend it."""


def checked_messages(value: Any, where: str, name: str) -> list[Message]:
    """A conversation: an optional system turn, then user and assistant in turn. Raises BadRow at anything else."""
    messages = checked_turns(value, where, name)
    due = "user"
    for number, role in enumerate(message["role"] for message in messages):
        place = f"{name}[{number}]"
        if role == "system" and number > 0:
            raise BadRow(f"{where}: {place}.role is 'system'; only the first message may be.")
        if role not in ("system", due):
            raise BadRow(f"{where}: {place}.role is {role!r} where {due!r} is due; join turns of one speaker.")
        due = "assistant" if role == "user" else "user"
    return messages


def checked_turns(value: Any, where: str, name: str) -> list[Message]:
    """Messages in any order, at least one. Raises BadRow where one is no message."""
    messages: list[Message] = []
    for number, message in enumerate(checked_list(value, where, name)):
        place = f"{name}[{number}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(f"{where}: {place} must have the keys role and content.")
        role = message["role"]
        if role not in _ROLES:
            raise BadRow(f"{where}: {place}.role={role!r} is not one of {', '.join(_ROLES)}.")
        messages.append(checked_message(role, message["content"], where, f"{place}.content"))
    if not messages:
        raise BadRow(f"{where}: {name} is empty.")
    return messages


def checked_message(role: str, content: Any, where: str, place: str) -> Message:
    """A message of one role. Raises BadRow where its content is no text, or none that UTF-8 can hold."""
    if not isinstance(content, str):
        raise BadRow(f"{where}: {place} is {'null' if content is None else type(content).__name__}, not a text.")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"{where}: {place} holds half a character (a lone surrogate) at {error.start}.") from error
    return {"role": role, "content": content}


def checked_list(value: Any, where: str, name: str) -> list[Any]:
    """The value itself. Raises BadRow where it is no list."""
    if not isinstance(value, list):
        raise BadRow(f"{where}: {name} is {'null' if value is None else type(value).__name__}, not a list.")
    return value
