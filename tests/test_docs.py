"""The README and docs/: what they say to type, to click and to read.

Every command parses, every link and anchor exists, the Python in them runs and computes what
quest.py does, and the notebook's cells run. That the tables are those of assets/report.py is in
test_report.py.
"""
import json
import pathlib
import re
import shlex
import sys

import pytest
import torch

import lrqat
import model
import nanobit.cli
import normtweak
import pvtune
import quest
import time_lrqat_memory
from conftest import TEXT, call, load_report

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "assets"))
import law

PAGES = {str(path.relative_to(ROOT)): path.read_text()
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)

# ---- Commands ---------------------------------------------------------------------------------

LAUNCHERS = (r"python ", r"torchrun --standalone --nproc_per_node=\d+ ", r"uv run ")
SCRIPTS = {"model.py": nanobit.cli, "quest.py": quest, "lrqat.py": lrqat, "pvtune.py": pvtune,
           "normtweak.py": normtweak, "assets/law.py": law,
           "tests/time_lrqat_memory.py": time_lrqat_memory}

def commands_of(page):
    """[[script, argument, ...]] of a page: lines of its blocks, and code within its lines that has
    no word of capitals in the place of a value."""
    text = PAGES[page]
    lines = [line.strip() for block in FENCED.findall(text.replace("\\\n", ""))
             for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    lines += [code for code in inline if not re.search(r" (?!DIR|FILE|FOLDER|CKPT)[A-Z]+\b", code)]

    found = []
    for line in lines:
        match = re.match(rf"({'|'.join(LAUNCHERS)})(\S+\.py\b.*)", line)
        if match:
            words = shlex.split(match[2], comments=True)
            ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", ";", "…")]
            found.append(words[:min(ends, default=None)])
    return found

def add_the_readmes_method(monkeypatch):
    """Add to quest.py what the README calls a method of your own -> its name."""
    name, line = re.search(r' "(\w+)": (Quantizer\(.*\)),\n', PAGES["README.md"]).groups()
    monkeypatch.setitem(quest.QUANTIZERS, name, eval(line, vars(quest)))
    return name

@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, monkeypatch):
    class Parsed(Exception):
        pass
    def stop(*args):
        raise Parsed

    # Parse, then go no further.
    add_the_readmes_method(monkeypatch)
    for module in SCRIPTS.values():
        monkeypatch.setattr(module, "report" if module is law else "resolve", stop)
    monkeypatch.setattr(nanobit.cli, "load_checkpoint", stop)          # model.py export
    for script, *words in commands_of(page):
        assert (ROOT / script).exists(), script
        if script in SCRIPTS:
            monkeypatch.setattr(sys, "argv", [script, *words])
            with pytest.raises(Parsed):
                SCRIPTS[script].main()

def test_every_script_has_a_command_that_the_test_above_finds():
    found = {script for page in PAGES for script, *_ in commands_of(page)}
    assert set(SCRIPTS) <= found
    assert {script for script, *_ in commands_of("README.md")} >= {
        "model.py", "quest.py", "lrqat.py", "pvtune.py", "normtweak.py", "assets/report.py"}

# ---- Links ------------------------------------------------------------------------------------

def anchors_of(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]

def links_of(text):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text))
            if not re.match(r"https?:", link)]

@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    here = (ROOT / page).parent
    for link in links_of(PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (here / path).resolve() if path else ROOT / page
        assert target.exists() and ROOT in (target, *target.parents), link
        if anchor:
            assert anchor in anchors_of(target.read_text()), link

@pytest.mark.parametrize("page", PAGES)
def test_no_heading_occurs_twice_on_a_page(page):
    anchors = anchors_of(PAGES[page])
    assert len(anchors) == len(set(anchors))

def test_the_readme_leads_to_every_page_and_the_notebooks_links_exist():
    links = {link.partition("#")[0] for link in links_of(PAGES["README.md"])}
    assert {*PAGES, "docs/quickstart.ipynb"} - {"README.md"} <= links
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    for link in links_of(text):
        path, _, anchor = link.partition("#")
        assert not anchor or anchor in anchors_of((ROOT / "docs" / path).read_text()), link

def test_every_figure_is_shown_on_a_page():
    shown = {(ROOT / page).parent.joinpath(link).resolve()
             for page in PAGES for link in links_of(PAGES[page]) if link.endswith(".png")}
    assert set((ROOT / "assets").glob("*.png")) <= shown

# ---- Python and the notebook ------------------------------------------------------------------

@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of its own, where the tiny preset trains in a second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(model.PRESETS, "tiny", model.Preset(1, 64, 2, 128, 4e-3, 8, 4, 2, 16))
    (tmp_path / "text.txt").write_text(TEXT)

def python_of(page):
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.M | re.S)

def test_the_lines_that_show_quest_compute_its_values_and_its_gradient():
    lines, = python_of("README.md")
    names = {}
    exec(lines, names)
    x = names["x"].requires_grad_(True)
    h_hat = quest.quest_fake_quant(x, names["bits"])
    assert torch.equal(h_hat, names["h_hat"])
    h_hat.backward(names["gradient"])
    assert torch.allclose(x.grad, names["x_grad"], atol=1e-6)
    assert not names["trusted"].all()                  # or the mask would not matter

def test_the_lines_that_use_a_checkpoint_write_text(small, capsys):
    status, _, err = call(capsys, "quest.py --data text.txt --vocab 300 --bits 4")
    assert status == 0, err
    lines, = python_of("docs/guide.md")
    exec(lines, {})
    assert capsys.readouterr().out.startswith("class ")

def test_a_method_of_your_own_is_added_as_the_readme_says(small, monkeypatch, capsys):
    name = add_the_readmes_method(monkeypatch)
    flags = re.search(rf"`python quest.py (.*--quantizer {name})`", PAGES["README.md"])[1]
    status, out, err = call(capsys, f"quest.py {flags} --data text.txt --vocab 300")
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["method"] == name

def test_the_notebook_has_four_cleared_cells_that_call_scripts():
    assert (NOTEBOOK["nbformat"], len(CELLS)) == (4, 4)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert all(re.fullmatch(r"!cd \.\. && python \S+\.py .*", cell) for cell in CELLS)

@pytest.mark.slow
def test_the_notebooks_cells_run_one_after_the_other(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "report", load_report())
    for cell in CELLS:
        command = cell.removeprefix("!cd .. && python ").replace("assets/report.py", "report.py")
        status, out, err = call(capsys, command)
        assert status == 0, (cell, err)
    assert "| GPTQ + tweak |" in out and "| QuEST W4A4, from scratch |" in out
