"""The documents name only what is there: flags, variables, files, links, formats."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import formats_table
import pytest
import stages_table
import tools

TEXTS = {name: documents.read(name) for name in documents.NAMES}
STAGES = sorted(path.stem for path in tools.ROOT.glob("*.py"))
COMMANDS = [
    line for text in TEXTS.values() for line in documents.commands(text, "bash", "sh", "text")
]


def flags_of(stage: str) -> set[str]:
    """The flags that any document gives to the stage, in commands and in running text."""
    spans = [words for text in TEXTS.values() for words in re.findall(r"`([^`\n]*)`", text)]
    words = [line.partition(f"{stage}.sh ")[2] for line in COMMANDS + spans]
    section = TEXTS["docs/stages.md"].partition(f"\n## {stage}\n")[2].partition("\n## ")[0]
    words += re.findall(r"`(--[^`\n]*)`", section)
    return {flag for line in words for flag in re.findall(r"(?<![\w-])--[\w-]+", line)}


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) < 150


def test_every_document_with_commands_is_run():
    assert set(documents.RUN) == {n for n, text in TEXTS.items() if documents.blocks("bash", text)}


def test_every_stage_has_an_example():
    assert set(STAGES) <= set(documents.sections("docs/stages.md"))


def test_speculative_md_shows_the_whole_process():
    lines = documents.commands(TEXTS["speculative.md"], "bash")
    assert {re.search(r"\bbash (\w+)\.sh", line)[1] for line in lines} == {
        "generate", "eagle3", "extract_features", "convert", "validate", "export",
    }  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_flags_exist(stage):
    known = tools.run(f"{stage}.py", "--help-all").stdout
    assert (tools.ROOT / f"{stage}.sh").is_file()
    flags = flags_of(stage) - {"--help", "--help-all"}
    assert flags
    assert not {flag for flag in flags if not re.search(rf"{flag}\b", known)}


@pytest.mark.parametrize("name", sorted(n for n in TEXTS if documents.blocks("bash", TEXTS[n])))
def test_its_variables_are_those_of_the_launchers(name):
    shown = "\n".join(documents.blocks("bash", TEXTS[name]))
    variables = set(re.findall(r"\b([A-Z][A-Z_]{2,})=", shown)) - {"MLM_WORK_DIR"}
    launchers = "".join(path.read_text() for path in tools.ROOT.glob("*.sh"))
    shared = (tools.ROOT / "conf" / "arguments.sh").read_text()
    assert variables or name == "README.md"
    assert not {each for each in variables if each not in launchers + shared}


def test_the_table_of_variables_is_complete():
    """Every variable that the launchers' shared file documents, and no other."""
    header = (tools.ROOT / "conf" / "arguments.sh").read_text().partition("\n\n# The shared")[0]
    documented = set(re.findall(r"^#     ((?:[A-Z][A-Z_]+ ?|, )+)", header, re.MULTILINE))
    documented = {word for entry in documented for word in re.findall(r"[A-Z][A-Z_]+", entry)}
    table = "\n".join(line for line in TEXTS["docs/variables.md"].splitlines() if line[:1] == "|")
    tabled = {
        word
        for names in re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
        for word in re.findall(r"[A-Z][A-Z_]+", names)
    }
    assert documented - tabled - {"MLM_LAUNCH"} == set()
    sources = "".join(
        p.read_text() for p in [*tools.ROOT.glob("*.sh"), *tools.ROOT.glob("conf/*.sh")]
    )
    assert {name for name in tabled if name not in sources} <= {"HF_TOKEN", "OPENAI_API_KEY"}


def test_commands_that_cannot_run_here_pass_their_checks(tmp_path):
    lines = [
        line
        for name in documents.NAMES
        if not name.startswith("slurm/")  # these need a cluster: the SLURM tests run them
        for line in documents.commands(TEXTS[name], "sh")
        if "tests/run.sh" not in line
    ]
    for line in lines:
        # A checkpoint that the command before it makes may be missing in a dry run. Otherwise
        # `true` stands for the launched stage: only the checks before it run.
        missing = "MLM_MODEL_CKPT" in line
        command = f"{line} --dry-run" if missing else f"LAUNCH_SCRIPT=true {line}"
        done = documents.shell(command, tmp_path, limit=120)
        assert done.returncode == 0, (line, done.stderr)
    assert len(lines) >= 5


@pytest.mark.parametrize(
    ("page", "name", "table"),
    [
        ("docs/formats.md", "formats", formats_table.markdown_table),
        ("docs/models.md", "stages", stages_table.markdown_table),
    ],
)
def test_a_generated_table_is_what_the_code_says(page, name, table):
    marked = rf"<!-- {name}: .*?-->\n(.*?)\n<!-- end of {name} -->"
    shown = re.search(marked, TEXTS[page], re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == table().strip()


def test_every_conf_is_listed():
    confs = {str(p.relative_to(tools.ROOT / "conf"))[:-3] for p in tools.ROOT.glob("conf/*/*.sh")}
    assert {name for name in confs if f"`{name}`" not in TEXTS["docs/models.md"]} == set()


def test_the_packages_of_the_design_are_those_of_the_library():
    named = re.findall(r"^ (\w+)/ ", TEXTS["docs/design.md"], re.MULTILINE)
    library = tools.ROOT / "post_training"
    assert sorted(named) == sorted(path.parent.name for path in library.glob("*/__init__.py"))


@pytest.mark.parametrize("name", documents.NAMES)
def test_every_named_file_is_there(name):
    text = TEXTS[name]
    folders = r"tests|post_training|quickstart|benchmarks|conf|docs|slurm|docker"
    for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text):
        if path.startswith("quickstart/") and not Path(path).suffix:
            path = f"conf/{path}.sh"
        assert (tools.ROOT / path).exists(), path
    for test in re.findall(r"`(test_\w+\.py)`", text):
        assert list((tools.ROOT / "tests").rglob(test)), test


@pytest.mark.parametrize("name", documents.NAMES)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        path = (tools.ROOT / name).parent / file if file else tools.ROOT / name
        assert path.exists(), target
        if heading:
            headings = re.findall(r"^#+ +(.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
            assert heading in anchors, target
