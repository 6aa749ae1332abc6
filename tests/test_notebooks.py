"""The notebooks run from the first cell to the last on a CPU, and are kept without what they printed."""

import re
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from tests import tiny
from zephyr.data.batch import Conversation, Pair, pack_conversations, pack_pairs
from zephyr.observe import tokens

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SAID = {  # what a notebook has to show in the end
    "01-what-the-model-sees": [tokens.COLOURS["scored"], tokens.COLOURS["rejected"], "image/png"],
    "02-sft-to-dpo": ["of held-out pairs in the right order", "sft  What is Ada's job?", "dpo  What is 2 plus 3?"],
    "03-reading-runs": ["objective.beta", "eval loss 0.693", "image/png"],
    "04-chat": ["parameters on cpu"],
}


def test_they_are_numbered():
    assert [path.stem for path in NOTEBOOKS] == [*SAID]
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == [*range(1, len(NOTEBOOKS) + 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stripped(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where notebooks leave their runs
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))  # this checkout, whichever is installed
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    if path.stem == "04-chat":  # beside a run that nobody has made here
        tiny.model(0, max_position_embeddings=128).save_pretrained(tmp_path / "outputs" / "demo" / "dpo" / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "outputs" / "demo" / "dpo" / "model")
    (tmp_path / "notebooks").mkdir()
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    ).execute()
    shown = str([output for cell in notebook.cells for output in cell.get("outputs", [])])
    assert [text for text in SAID[path.stem] if text not in shown] == []


def test_tokens_have_the_colour_of_what_they_are_for():
    tokenizer = tiny.tokenizer()
    ids = tokenizer("a<\n").input_ids
    shown = tokens.conversation(tokenizer, Conversation(ids, [False, True, True]))
    boxes = re.findall(r'<span title="(\d+)" style="background:(#\w+);[^>]*>(.*?)</span>', shown)
    read, scored = tokens.COLOURS["read"], tokens.COLOURS["scored"]
    assert boxes == [(str(ids[0]), read, "a"), (str(ids[1]), scored, "&lt;"), (str(ids[2]), scored, "↵")]
    assert shown.count("<br>") == 1
    a, b, c = tokenizer("abc").input_ids
    colours = re.findall(r"background:(#\w+)", tokens.pair(tokenizer, Pair([a], [b, c], [c])))
    assert colours == [read, tokens.COLOURS["chosen"], tokens.COLOURS["chosen"], tokens.COLOURS["rejected"]]
    assert to_rgb(tokens.COLOURS["chosen"]) != to_rgb(tokens.COLOURS["rejected"])


def test_a_row_shows_who_attends_to_whom():
    apart = tokens.sight(pack_conversations([Conversation([1, 2], [False, True])] * 2)).tolist()
    assert apart == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    batch = pack_pairs([Pair([1, 2], [3], [4, 5])])
    assert tokens.sight(batch).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [2, 2, 0, 1, 0],
        [2, 2, 0, 1, 1],
    ]
    assert len(tokens.attention(batch).axes[0].lines) == 1 + 2  # the dots; the rejected branch's two edges
