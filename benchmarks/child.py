"""Functions in processes of their own, each of which begins with the modules that this one has loaded."""

import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in a fork of this process, on one thread. Raises RuntimeError with its traceback."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def body() -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")
        try:
            sending.send((function(*args), None))
        except BaseException:
            sending.send((None, traceback.format_exc()))

    process = context.Process(target=body)
    process.start()
    sending.close()
    try:
        result, error = receiving.recv()
    except EOFError:
        result, error = None, "it died without a word"
    process.join()
    if error is not None:
        raise RuntimeError(f"{getattr(function, '__name__', function)} failed in its process:\n{error}")
    return result
