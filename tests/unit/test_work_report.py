"""The report of a work folder: what it shows, what it leaves out, and that nothing of it runs."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import speed
import tools
from huggingface_hub import ModelCard

from post_training.checkpoints.source import Source
from post_training.common import files, manifest
from post_training.common.manifest import Manifest
from post_training.export import stated
from post_training.export.model_card import Card
from post_training.reporting import building, chain, measures, page, records, text_page
from post_training.reporting.markup import fenced, markdown
from post_training.reporting.measures import Measured
from post_training.reporting.plots import front
from post_training.reporting.records import Record

EVIL = "</title></svg><script>document.title='ran'</script><img src=x onerror=alert(1)>"
NAME = "<script>document.title='ran'"  # a file's name has no slash
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def output(folder: Path, stage: str, source: Path | None = None, **content) -> Path:
    """An output as a stage leaves it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"0" * content.pop("bytes", 1000))
    given = {"model": source, "teacher": content.pop("teacher", None)}
    inputs = [manifest.describe_input(role, each) for role, each in given.items() if each]
    metrics, flags = content.pop("metrics", {}), content.pop("configuration", {})
    Manifest(stage, {}, flags, inputs, metrics, extra=content).write(folder)
    return folder


def measured(path: Path, model: Path, stage: str = "mmlu", **content) -> Path:
    """A report as a stage leaves it."""
    given = {"model": model, "reference": content.pop("reference", None)}
    inputs = [manifest.describe_input(role, each) for role, each in given.items() if each]
    files.write_json(path, {"stage": stage, "command": f"{stage}.py", "inputs": inputs, **content})
    return path


def scored(accuracy: float, low: float, high: float, letters: str = "ABCD") -> dict:
    count = {"accuracy": accuracy, "interval_95": [low, high], "correct": 1, "total": 4}
    return {
        **count,
        "few_shots": 0,
        "subjects": {"physics": count},
        "answers": {"physics": letters},
    }


@pytest.fixture
def work(tmp_path) -> Path:
    """Converted, quantized, exported; pruned and distilled; scored."""
    work = tmp_path / "work"
    (tmp_path / "source").mkdir()
    counted = {"parameters": 4_000_000, "dtype": "bf16"}
    start = output(work / "start", "convert", tmp_path / "source", metrics=counted)
    ranges = {
        f"decoder.layers.{n}.mlp.linear_fc2": {"weight": 0.5, "input": 10.0**n} for n in range(4)
    }
    used = {"expert_tokens": {"0": [5, 0, 7], "1": [1, 2, 3]}, "expert_tokens_added": {}}
    found = {"coverage": {"bits_per_weight": 8.5}, "ranges": ranges, "calibration": used}
    form = {"quant_algo": "FP8", "format": "fp8"}
    small = output(work / "small", "quantize", start, quantization=form, metrics=found)
    written = {"quant_algo": "FP8", "bits_per_weight": 8.5, "tensors_compared": 12}
    output(work / "served", "export", small, bytes=4_250_000, metrics=written)
    after = {"after": {"parameters": 2_000_000}}
    output(work / "pruned", "prune", start, metrics=after, configuration={"bf16": True})
    output(work / "distilled", "distill", work / "pruned", teacher=start)
    measured(work / "a.json", start, **scored(0.9, 0.8, 0.95))
    measured(work / "b.json", small, **scored(0.85, 0.75, 0.92, "ABCC"))
    return work


def cells(text: str) -> dict[str, list[str]]:
    """The rows of all tables of a page by their first cell."""
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL):
        first, *rest = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        found.setdefault(html.unescape(first), list(map(html.unescape, rest)))
    return found


def unfenced(text: str) -> str:
    """Markdown without its code blocks."""
    return re.sub(r"^(`{3,})sh\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


class Tags(HTMLParser):
    """The tags and attributes of a page as a browser reads it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names, self.attributes, self.words = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


def test_before_and_after_are_what_was_recorded(work):
    document, count = building.build([work])
    assert count == 7
    table = cells(page.render(document))
    columns = table["output"]
    rows = {
        name: dict(zip(columns, table[name], strict=True))
        for name in ("start", "small", "served", "pruned")
    }
    weights = {name: row["weights"] for name, row in rows.items()}
    assert weights == {"start": "8.0 MB", "small": "4.2 MB", "served": "4.2 MB", "pruned": "4.0 MB"}
    assert (
        rows["small"]["bits per weight"] == "8.50" and rows["pruned"]["bits per weight"] == "16.00"
    )
    assert rows["small"]["score, % (95 %)"] == "85.0 (75.0 to 92.0)"
    assert rows["small"]["change, points (95 %)"].startswith("\N{MINUS SIGN}5.0 (")
    assert rows["pruned"]["score, % (95 %)"] == "-"
    assert {row["KL divergence"] for row in rows.values()} == {"-"}
    text = text_page.render(document)
    assert "| small | quantize | 4.2 MB | 8.50 |" in text
    assert "only read: distilled from start (teacher)" in text
    assert "- **served**: 4.2 MB of weights, 53 % of start; FP8, 8.50 bits per weight; " in text
    assert "score 85.0 % (75.0 to 92.0), measured on small, a change of" in text


def test_the_chain_is_found_by_hashes_wherever_the_folder_lies(work, tmp_path):
    moved = work.rename(tmp_path / "elsewhere")
    found = chain.build(records.collect([moved]).records)
    made = {node.name: [link.node.name for link in node.links] for node in found.nodes}
    assert made["served"] == ["small"] and made["small"] == ["start"]
    assert [len(node.reports) for node in found.nodes if node.name in ("start", "small")] == [1, 1]
    assert all(link.current for node in found.nodes for link in node.links)


def test_a_score_of_a_model_that_was_made_again_does_not_count(work):
    shutil.rmtree(work / "small")
    again = output(work / "small", "quantize", work / "start", quantization={"quant_algo": "NVFP4"})
    found = chain.build(records.collect([work]).records)
    node = next(each for each in found.nodes if each.path == str(again))
    assert measures.score(node) is None and len(node.outdated) == 1
    text = text_page.render(building.build([work])[0])
    assert "made again after they were measured: b.json" in text
    assert "Made again after something was made from it (dotted): small" in text


def test_changes_of_what_is_not_comparable_are_not_computed(work):
    measured(work / "b.json", work / "small", **{**scored(0.85, 0.75, 0.92), "few_shots": 5})
    assert cells(page.render(building.build([work])[0]))["small"][5] == "-"


def test_what_is_measured_otherwise_is_marked_and_stands_in_no_plot(work):
    for name, texts, window in (("start", "A", 64), ("small", "A", 64), ("pruned", "B", 64)):
        text = {"window": window, "stride": window, "tokens": 9, "model": {"perplexity": 8.0}}
        path = measured(work / f"{name}.json", work / name, "evaluate", text=text)
        content = json.loads(path.read_text())
        content["inputs"].append({"role": "text", "path": f"/{name}", "sha256": texts})
        path.write_text(json.dumps(content))
    document = building.build([work])[0]
    rows = cells(page.render(document))
    assert [rows[name][7] for name in ("start", "small")] == ["8.0000"] * 2
    assert rows["pruned"][7] == "8.0000 *"
    plotted = re.search(r"perplexity by size: ([^<]*?)\. None", page.render(document))
    assert plotted and "start" in plotted[1] and "pruned" not in plotted[1]


@pytest.mark.parametrize(
    "said",
    [{"configuration": {"weights_only": True}}, {"notes": {"model": {"weights_only": True}}}],
)
def test_a_score_with_unrounded_inputs_is_not_the_models(work, tmp_path, said):
    sheet = scored(0.99, 0.9, 1.0)
    path = work / "c.json"
    measured(path, work / "small", "evaluate", measures={"mmlu": {"model": sheet}}, **said)
    assert cells(page.render(building.build([work])[0]))["small"][4] == "85.0 (75.0 to 92.0)"
    assert "(weights alone)" in text_page.render(building.build([work])[0])
    found = card(work, work / "small", tmp_path / "a", quant_algo="FP8")
    (result,) = found.data.eval_results
    assert (result.metric_value, result.metric_name) == (0.85, "accuracy, 0-shot, 4 questions")
    (work / "b.json").unlink()
    assert cells(page.render(building.build([work])[0]))["small"][4] == "99.0 (90.0 to 100.0) *"
    assert card(work, work / "small", tmp_path / "b", quant_algo="FP8").data.eval_results is None


def test_ranges_experts_answers_and_acceptance_are_shown(work):
    measured(
        work / "v.json", work / "start", "validate", settings={"steps": 2},
        acceptance={
            "acceptance_length": 2.0, "interval_95": [1.5, 2.5], "answers": 4,
            "acceptance_rate_by_position": [0.7, 0.3],
            "categories": {"maths": {"acceptance_length": 1.75, "answers": 2}},
        },
    )  # fmt: skip
    text = text_page.render(building.build([work])[0])
    assert "largest input, as calibrated: linear\\_fc2 1.00 to 1,000." in text
    assert "0 to 7; 1 of 6 experts got none." in text
    assert "| small | 1 | 4 | 25.0 |" in text and "| physics | 4 | D | C |" in text
    assert "position 1 0.700; position 2 0.300" in text and "| maths | 1.75 |" in text


def test_an_evaluation_beside_a_reference_gives_paired_differences(work):
    sheet = scored(0.88, 0.8, 0.95)
    difference = {"difference": -0.02, "interval_95": [-0.05, 0.01], "gained": 1, "lost": 3}
    path = work / "e.json"
    flips = work / "e.flips.jsonl"
    flips.write_text(json.dumps({"measure": "mmlu", "id": "physics/3", "change": "lost"}) + "\n")
    entry = {"model": sheet, "reference": scored(0.9, 0.8, 0.95), "difference": difference}
    measured(
        path, work / "small", "evaluate", reference=work / "start", measures={"mmlu": entry},
        text={"model": {"perplexity": 8.25}, "reference": {"perplexity": 8.0},
              "kl": {"mean": 0.0125, "interval_95": [0.01, 0.015]}},
        flipped={"file": flips.name, **files.describe(flips)}, broken_bounds=["too far"],
    )  # fmt: skip
    document, _ = building.build([work])
    row = cells(page.render(document))["small"]
    minus = "\N{MINUS SIGN}"
    assert row[4:8] == [
        "88.0 (80.0 to 95.0)", f"{minus}2.0 ({minus}5.0 to +1.0)",
        "0.0125 (0.0100 to 0.0150)", "8.2500",
    ]  # fmt: skip
    assert cells(page.render(document))["start"][7] == "8.0000"
    text = text_page.render(document)
    assert "| mmlu | physics/3 | lost |" in text and "| too far |" in text
    flips.write_text("{}\n")
    assert "not what e.json describes" in text_page.render(building.build([work])[0])


def test_the_interval_of_a_difference_is_newcombes():
    """The published example: 56 of 70 against 48 of 80 is 0.0524 to 0.3339."""
    content = Record(Path("x.json"), {})
    more = Measured(56 / 70, (0.6918, 0.8769), content)
    fewer = Measured(48 / 80, (0.4905, 0.7004), content)
    difference, spread = measures.compared(fewer, more)
    assert difference == pytest.approx(0.2)
    assert spread == pytest.approx((0.0524, 0.3339), abs=2e-4)


def test_the_front_has_what_nothing_smaller_is_better_than():
    points = [(1, 0.5), (2, 0.9), (3, 0.9), (3, 0.95), (1, 0.4)]
    assert front(points) == [True, True, False, True, False]


def test_what_cannot_be_read_is_named_and_the_rest_shown(work):
    for name, text in {
        "cut": '{"stage": "conv',
        "odd": '{"stage": "convert", "metrics": [1]}',
    }.items():
        (work / name).mkdir()
        (work / name / "run.json").write_text(text)
    changed = json.loads((work / "small" / "run.json").read_text())
    (work / "small" / "run.json").write_text(json.dumps({**changed, "seconds": 0}))
    (work / "notes.json").write_text('{"stage": 7}')
    text = text_page.render(building.build([work])[0])
    assert "Files that were not read" in text
    for part in ("cut/run.json", "odd/run.json", "it was changed after it was written"):
        assert part in text.replace("\\_", "_")
    assert "| start | convert |" in text and "| small |" not in text


ODD = [None, True, [], {}, "x", -1, 0, 1e308, 10**400, [1], [2, 1], {"a": 1}, EVIL]


def test_a_report_of_any_form_is_shown_without_an_error(work):
    names = "accuracy interval_95 subjects answers acceptance text measures warnings versions total"
    recorded = "coverage ranges calibration parameters bits_per_weight draft after".split()
    (work / "start" / "training").mkdir()
    for number, value in enumerate(ODD):
        for name in names.split():
            measured(work / "b.json", work / "small", **{**scored(0.8, 0.7, 0.9), name: value})
            building.build([work])
        output(
            work / f"x{number}", "quantize", work / "start", metrics=dict.fromkeys(recorded, value)
        )
        rates = {"interval_95": value, "acceptance_rate_by_position": value}
        found = {"acceptance_length": 2.0, "categories": {"a": value}, **rates}
        measured(work / "c.json", work / "start", "validate", acceptance=found)
        measured(work / "d.json", work / "start", "future", figures={"a": value, "b": {"c": value}})
        lines = [{"kind": "train", "iteration": n, "loss": 1.0 / n, "x": value} for n in (1, 2)]
        text = "".join(f"{json.dumps(line)}\n" for line in lines) + '"no object"\n{"cut'
        (work / "start" / "training" / "metrics.jsonl").write_text(text)
        document, _ = building.build([work])
        page.render(document)
        assert "loss from 1.00 to 0.500" in text_page.render(document), value


@pytest.fixture
def hostile(tmp_path) -> Path:
    """Every string that a file can hold, and names of folders, try to be markup."""
    work = tmp_path / f"work {NAME}"
    start = output(work / f"a {NAME}", EVIL, metrics={"parameters": 10, "dtype": "bf16"},
                   warnings=[EVIL], configuration={EVIL: EVIL})  # fmt: skip
    ranges = {f"decoder.layers.{n}.{EVIL}": {"weight": 1.0 + n} for n in range(2)}
    output(work / f"b {NAME}", "quantize", start, metrics={"ranges": ranges, "dtype": "bf16"},
           quantization={"quant_algo": EVIL, "format": EVIL})  # fmt: skip
    sheet = scored(0.5, 0.4, 0.6)
    evil = {**sheet, "subjects": {EVIL: sheet["subjects"]["physics"]}, "answers": {EVIL: "AB"}}
    measured(work / "a.json", start, **evil)
    measured(work / "b.json", work / f"b {NAME}", **evil, versions={EVIL: EVIL}, git_commit=EVIL)
    measured(work / "v.json", start, "validate",
             acceptance={"acceptance_length": 1.5, "acceptance_rate_by_position": [0.5],
                         "categories": {EVIL: {"acceptance_length": 1.2}}})  # fmt: skip
    measured(work / "f.json", start, f"future{EVIL}", **{EVIL: 3, "command": EVIL + "\u202e"})
    (start / "training").mkdir()
    lines = [{"kind": "train", "iteration": n, "loss": 2.0, EVIL: n} for n in (1, 2)]
    (start / "training" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return work


def test_nothing_of_a_file_is_markup(hostile):
    document, _ = building.build([hostile])
    text = page.render(document)
    found = Tags(text)
    assert not found.names & {"script", "img", "iframe", "link", "object", "base", "a:href"}
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#s") for name, value in found.attributes if name == "href")
    assert EVIL in "".join(found.words)  # it is shown as the text that it is
    assert "\u202e" not in text
    assert "default-src 'none'" in text and "http://" not in text and "url(" not in text
    plain = unfenced(text_page.render(document))
    assert "<script" not in plain and "<img" not in plain


def test_markdown_keeps_texts_in_their_place():
    assert markdown("a|b\n# c `d` <e>") == "a\\|b # c \\`d\\` &lt;e&gt;"
    assert markdown("# a") == "\\# a" and markdown("1. a") == "1\\. a"
    assert markdown("-") == "-" and markdown("1.5 (2 to 3)") == "1.5 (2 to 3)"
    assert fenced("a\n```\nb") == "````\na\n```\nb\n````"


def browse(pages: dict[str, str], width: int) -> str:
    """Pages in frames of a width, and a script that says what a browser made of each."""
    style = f"width:{width}px;height:900px;border:0"
    return "".join(
        f'<iframe data-name="{name} {width}" srcdoc="{html.escape(text)}" style="{style}"></iframe>'
        for name, text in pages.items()
    )


SEEN = """<pre id=o></pre><script>onload = () => {
  const frames = [...document.querySelectorAll('iframe')];
  o.textContent = JSON.stringify(Object.fromEntries(frames.map(f => {
    const d = f.contentDocument, e = d.documentElement;
    const texts = [...d.querySelectorAll('p, td, th, li')];
    const size = n => parseFloat(getComputedStyle(n).fontSize);
    const small = texts.filter(n => n.offsetParent && size(n) < 11);
    const picture = [...d.querySelectorAll('.wide, .narrow')].filter(n => n.offsetParent);
    return [f.dataset.name, {title: d.title, width: e.scrollWidth, small: small.length,
      tables: d.querySelectorAll('table').length, picture: picture.map(n => n.className)}]; })));
}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_runs_nothing_of_a_hostile_folder_and_needs_no_width(hostile, work, tmp_path):
    folders = {"hostile": hostile, "plain": work}
    pages = {name: page.render(building.build([each])[0]) for name, each in folders.items()}
    frames = tmp_path / "frames.html"
    frames.write_text(browse(pages, 360) + browse(pages, 1280) + SEEN, encoding="utf-8")
    options = "--headless=new --no-sandbox --disable-gpu --enable-logging=stderr --dump-dom".split()
    own = f"--user-data-dir={tmp_path / 'profile'}"
    how = {"capture_output": True, "text": True, "timeout": speed.scaled(60)}
    done = subprocess.run([CHROMIUM, *options, own, frames.as_uri()], **how)
    said = re.search(r'<pre id="o">(.*?)</pre>', done.stdout)
    assert said, done.stderr[-2000:]
    seen = json.loads(html.unescape(said[1]))
    assert len(seen) == 4
    for name, found in seen.items():
        width = int(name.split()[1])
        assert found["title"].startswith("Report of work"), found
        assert found["width"] <= width and found["small"] == 0 and found["tables"] > 3, (
            name,
            found,
        )
        assert found["picture"] == ["narrow" if width == 360 else "wide"]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_the_command_writes_both_files_within_a_second(work, tmp_path):
    shell = ["bash", str(tools.ROOT / "report.sh")]
    environment = tools.environment(MLM_WORK_DIR=str(work), PYTHON=sys.executable)
    how = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    started = time.monotonic()
    done = subprocess.run(shell, **how)
    assert time.monotonic() - started < speed.scaled(1.5)
    assert done.returncode == 0 and str(work / "report.html") in done.stdout, done.stderr
    written = (work / "report.html").read_text()
    assert subprocess.run(shell, **how).returncode == 0  # in place of its own
    assert (work / "report.html").read_text() == written
    (tmp_path / "page.html").write_text("mine")
    for words, part in (
        (["nowhere"], "there is no such folder"),
        (["source"], "no run.json and no report"),
        (["--output", "page.html"], "it exists, and is no report"),
        (["--output", "page.txt"], "the page is an HTML file"),
        (["--output", "work/small/page.html"], "would hold more than that"),
    ):
        done = subprocess.run([*shell, *words], **how)
        assert done.returncode == 2 and part in done.stderr, done.stderr
    done = subprocess.run([*shell, "work/small"], **how)
    assert done.returncode == 0 and (work / "small.report.html").is_file(), done.stderr
    done = subprocess.run([*shell, "work", "--output", "page.html", "--overwrite"], **how)
    assert done.returncode == 0 and page.GENERATOR in (tmp_path / "page.html").read_text()


def card(work: Path, source: Path, target: Path, **metrics) -> ModelCard:
    """The card of an export, as the hub's library reads it."""
    target.mkdir()
    (target / "README.md").write_text("---\nlicense: mit\n---\n# Not this model's")
    (target / "config.json").write_text("{}")
    made = Manifest("export", {}, metrics={"tensors_compared": 12, "quant_algo": None, **metrics})
    checkpoint = Source(str(source), is_checkpoint=True, described=None, huggingface=None)
    Card(f"a|b\n{EVIL}", checkpoint, work, made, "vllm").write(target)
    return ModelCard.load(target / "README.md")


def test_a_model_card_says_what_manifests_say_and_nothing_else(work, tmp_path):
    found = card(work, work / "small", tmp_path / "a", quant_algo="FP8", bits_per_weight=8.5)
    assert found.data.library_name == "Model Optimizer"
    assert found.data.tags == ["ModelOpt", "vllm", "FP8", "quantized"]
    assert [each.metric_value for each in found.data.eval_results] == [0.85]
    assert found.data.license is None and found.data.base_model is None
    assert "Not this model's" not in found.content
    assert "<script" not in unfenced(found.text) and "vllm serve 'a|b" in found.text
    assert "| stages | source → convert → quantize → export |" in found.text
    # Scored, but not as it is now.
    shutil.rmtree(work / "small")
    output(work / "small", "quantize", work / "start")
    assert card(work, work / "small", tmp_path / "b", quant_algo="FP8").data.eval_results is None


def test_the_base_model_of_a_card_is_the_one_of_the_hub(tmp_path):
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: de\n---\n")
    start = output(tmp_path / "start", "convert", cached)
    found = card(tmp_path, output(tmp_path / "tuned", "finetune", start), tmp_path / "a")
    assert (found.data.base_model, found.data.base_model_relation) == ("org/name", "finetune")
    assert (found.data.license, found.data.language) == ("mit", ["de"])
    assert found.data.library_name == "transformers" and "fine-tuned" in found.text
    draft = card(tmp_path, start, tmp_path / "b", draft_vocab_size=7)
    assert draft.data.base_model == "org/name" and "eagle3" in draft.data.tags
    assert "base_model_relation" not in draft.data.to_dict()


MIT, OWN, LINK = {"license": "mit"}, {"license_name": "own"}, {"license_link": "https://a.b/c"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlanguage:\n- en\ntags: [a]\n---\n# A", {**MIT, "language": ["en"]}),
        ("---\nlicense: mit\nlicense_name: own\nlicense_link: LICENSE\n---\n", {**MIT, **OWN}),
        ("---\nlicense: mit\nlicense_link: https://a.b/c\n---\n", {**MIT, **LINK}),
        ("---\nlanguage: no\nlicense: [a]\n---\n", {}),
        ("---\nlicense: 'a\n  b: ]'\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("# A\nlicense: mit\n", {}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", MIT),
        (None, {}),
    ],
)
def test_license_and_language_are_those_that_the_source_states(text, found, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert stated.license_and_language(tmp_path) == found
