"""01: what the parser makes of what LLMs really write, what is asked, and how a run goes on."""
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
from conftest import fresh
from standins import FakeLLM, run_main

stage = fresh("01_prompts")
TABLE = stage.word_table(stage.WORDS)
CITYSCAPES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light",
              "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
              "bus", "train", "motorcycle", "bicycle")


@pytest.fixture
def paper(monkeypatch):
    """01 with the 19 classes"""
    monkeypatch.setattr(common, "CLASSES", list(CITYSCAPES))
    monkeypatch.setattr(common, "PRESET", "gta")
    return fresh("01_prompts")


def collect(answer, n, missing, kept=None, **more):
    """stage.collect with N_PROMPTS = n -> kept prompts, classes that are missing, drop counts"""
    kept, missing, dropped = {} if kept is None else kept, list(missing), Counter()
    stage.N_PROMPTS = n
    stage.collect(answer, TABLE, kept, missing, dropped, **more)
    return kept, missing, dict(dropped)


# ---------------------------------------------------------------------------- the parser
CAR, BUS = "a photo of a car in rain", "a photo of a bus in town 3"


@pytest.mark.parametrize("line", [
    "{}", "12. A photo of a car in rain.", '- "{}"', "  * **{}**", "\t3) An photo of a car in rain",
    "“a photo of a **car** in rain”,", "**Prompt 1:** {}", "| 1 | {} | car |",
    "{} (classes: car)", "{} [car, sky]", "{} - classes: car", "{}. It names a car.",
    "<li>{}</li>", "{}<br>", "`{}`", "a photo of [a car] in [rain]", "a photo of\xa0a car in rain",
    '{{"prompt": "{}", "classes": ["car"]}}'])
def test_a_prompt_is_found_in_its_line(line):
    assert stage.parse(line.format(CAR), TABLE) == [(CAR, {"car"})]


@pytest.mark.parametrize("line", [
    '["{}", "{}"]', "['{}', '{}']", '```json ["{}","{}"]```', '["{}\\n", "{}\\n"]', "1. {} 2. {}",
    "1) {}, 2) {}.", "Prompt 1: {} Prompt 2: {}", "{}; {}", "{} and {}", "{}<br>{}<br>", "{}\n{}"])
def test_a_line_with_two_prompts_is_two_prompts(line):
    assert stage.parse(line.format(CAR, BUS), TABLE) == [(CAR, {"car"}), (BUS, {"bus"})]


@pytest.mark.parametrize("line", [
    "a photo of a child's bike in St. Petersburg", "a photo of a bus in town 3",
    "a photo of many poles, two fences and a tree in a village in winter"])
def test_what_belongs_to_a_prompt_stays(line):
    assert [prompt for prompt, _ in stage.parse(f"{line}.", TABLE)] == [line]


@pytest.mark.parametrize("line, why", [
    ("Sure, here are 100 diverse and simple prompts:", "not"), ("a photo of X in Z", "not"),
    ('Example of the prompt: "a photo of a car in Z"', "not"), ("```", "not"),
    ("a photo of a car on the road", "not"), ("a picture of a car in the rain", "not"),
    ("a photo of a car in the “old town”", "not"),
    ("a photo of a door in a house", "no class"), ("a photo of a scar in a market", "no class"),
    ("a photo of a person with a person with a person with a person in a town", "loop"),
    ("a photo of apersonwithapersonwithaperson in a town", "loop")])
def test_what_is_dropped_and_why(line, why):
    [(prompt, reason)] = stage.parse(line, TABLE)
    assert prompt is None and why in reason


@pytest.mark.parametrize("piece", [
    "a", " ", "1. ", "1.......... ", " in ", "-", "prompt ", "and ", "a photo of ", "aaa."])
def test_an_endless_line_takes_no_time(piece):
    line = "a photo of a car in " + piece * (2_000_000 // len(piece))
    since = time.process_time()
    assert not any(prompt for prompt, _ in stage.parse(line, TABLE))
    stage.parse_synonyms(line)
    assert time.process_time() - since < 5


def test_classes_are_found_by_whole_words_plurals_and_synonyms():
    assert stage.classes_in("two buses, people and bikes", TABLE) == {"bus", "person", "bicycle"}
    assert stage.classes_in("a traffic light", TABLE) == {"sign"}
    assert stage.classes_in("a scarf, a businessman", TABLE) == set()


def test_of_two_classes_with_a_word_the_first_has_it(paper):
    assert TABLE["cyclist"] == "bicycle"                        # the toy preset has no riders
    table = paper.word_table(paper.WORDS)
    assert table["cyclist"] == "rider" and table["traffic light"] == "traffic light"
    assert paper.classes_in("a stop sign, a lorry", table) == {"traffic sign", "truck"}


def test_the_hundred_prompts_that_are_shipped_name_every_class(paper):
    kept, missing, dropped = {}, list(CITYSCAPES), Counter()
    text = (Path(__file__).parent / "prompts.txt").read_text()
    paper.collect(text, paper.word_table(paper.WORDS), kept, missing, dropped)
    named = Counter(name for classes in kept.values() for name in classes)
    assert (len(kept), missing, dropped) == (100, [], {}) and min(named.values()) == 6


def test_a_weak_llms_synonyms_are_plain_words_and_rename_no_class():
    answer = ("Here are some words:\n1. pedestrian\n2. \"walker\"\n"
              "3. a person who is walking down a street\n- car\n4. pedestrian\n\n* passer by")
    assert stage.parse_synonyms(answer) == ["pedestrian", "walker", "passer by"]
    table = stage.word_table(stage.WORDS, {"road": ["railing", "boulevard"], "sky": ["cars"]})
    assert [table[w] for w in ("railing", "cars", "boulevards")] == ["fence", "car", "road"]


# ---------------------------------------------------------------------------- what is kept
def test_places_are_reserved_for_classes_that_nobody_named_for_a_while():
    n, cars = len(common.CLASSES), "\n".join(f"a photo of a car in town {i}" for i in range(40))
    kept, missing, dropped = collect(cars, n, common.CLASSES)
    assert len(kept) == 1 and dropped == {"enough of these": 39}
    names = "\n".join(f"a photo of a {name} in a town" for name in common.CLASSES)
    kept, missing, _ = collect(names, n, missing, kept)
    assert not missing and len(kept) == n
    kept, missing, _ = collect(cars, 3, common.CLASSES, fair=False)     # the LLM never names a sky
    assert len(kept) == 3 and "sky" in missing and "car" not in missing


def test_what_a_real_small_llm_wrote(tmp_path):
    """Eight recorded answers of SmolLM2-135M-Instruct to the request: of 140 lines ten are usable,
    and six last lines are cut off."""
    path = Path(__file__).parent / "smollm2.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ask = stage.recorded(lambda request, seed: rows[seed], tmp_path / "raw.jsonl")
    kept, dropped = {}, Counter()
    stage.N_PROMPTS = 60
    for turn in range(len(rows)):
        stage.collect(ask(turn, "?"), TABLE, kept, [], dropped)
    assert len(kept) == 10
    assert next(iter(kept)) == "a photo of a person standing in front of a building"
    assert dropped == {"not 'a photo of X in Z'": 95, "repeated": 19, "no class in X": 10}


# ---------------------------------------------------------------------------- what is asked
def test_synthias_request_leaves_out_the_classes_that_it_does_not_have(monkeypatch):
    monkeypatch.setattr(common, "CLASSES", list(CITYSCAPES))
    for preset, n in (("gta", 19), ("synthia", 16), ("cityscapes", 19)):
        monkeypatch.setattr(common, "PRESET", preset)
        classes = fresh("01_prompts").SOURCE_CLASSES
        assert len(classes) == n and ("truck" in classes) == (n == 19)


def run(out, llm, **constants):
    """main() of a new 01 with this LLM"""
    module = fresh("01_prompts")
    module.load_llm = lambda name: llm
    run_main(module, **{"OUT": str(out), "N_PROMPTS": 40} | constants)


def test_a_stopped_run_resumes_to_the_same_prompts(tmp_path):
    whole, first, second = FakeLLM(), FakeLLM(most=14), FakeLLM()
    run(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", first)
    run(tmp_path / "stopped", second)
    for name in ("prompts.txt", "raw.jsonl", "synonyms.json"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert first.seeds == list(range(14)) and second.seeds == whole.seeds[14:]


def test_every_second_request_names_only_what_is_missing(tmp_path):
    llm = FakeLLM()
    run(tmp_path, llm, SEED=1)
    asked = [request.split("[")[1].split("]")[0].split(", ") for request in llm.requests[12:]]
    assert asked[0] == common.CLASSES                           # seed 13: four classes are named
    assert asked[1] == [c for c in common.CLASSES if c not in ("car", "bus", "sky", "road")]
    assert asked[2] == common.CLASSES


def test_more_answers_may_be_asked_for_later(tmp_path):
    first, second = FakeLLM(), FakeLLM()
    with pytest.raises(common.Stop, match=r"(?s)2 answers gave 16 of 40 prompts.*--TRIES=4"):
        run(tmp_path, first, TRIES=2)
    run(tmp_path, second, TRIES=60)
    assert second.seeds[0] == len(first.seeds) == 14


@pytest.mark.parametrize("content, message", [
    ('{"request": "Hello", "answer": "", "cut": false}\n', "line 1: another request"),
    ("{}\n", "line 1: expected request, answer, cut"), ("[]\n", "line 1: expected request"),
    ('{"request": "List wor', "expected lines of JSON"), ("", "is empty"),
    ("caf\xe9\n", "expected lines of JSON")])
def test_a_broken_record_of_answers_is_named_with_what_helps(tmp_path, content, message):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, FakeLLM(most=0))
    (tmp_path / "raw.jsonl").write_text(content, encoding="latin-1")
    with pytest.raises(common.Stop, match=rf"(?s)raw.jsonl.*{message}.*[Rr]emove the file"):
        run(tmp_path, FakeLLM(most=0))
    (tmp_path / "raw.jsonl").unlink()           # as the message says
    run(tmp_path, FakeLLM())


# ---------------------------------------------------------------------------- models that think
@pytest.mark.parametrize("answer, cut, lines", [
    ("<think>a photo of a car in town</think>\n\nb\nc", False, "\n\nb\nc"),
    ("a photo of a car in town</think>\nb", False, "\nb"),
    ("<think>first</think>b<think>a photo of a car in town", True, ""),
    ("<think>a photo of a car in town\na photo of a bus in town", True, ""),
    ("b\nc\nd", True, "b\nc"), ("b\nc\n", True, "b\nc"), ("b", True, "")])
def test_thoughts_and_cut_lines_are_no_answer(tmp_path, answer, cut, lines):
    path = tmp_path / "raw.jsonl"
    ask = stage.recorded(lambda *_: {"answer": answer, "cut": cut}, path)
    assert ask(0, "?") == lines
    assert json.loads(path.read_text())["answer"] == answer     # the record has all of it


def llm_folder(folder, template=""):
    """The miniature LLM with another chat template; "" = none"""
    shutil.copytree(stage.LLM, folder)
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def ask(folder, request, seed=0):
    module = fresh("01_prompts")
    module.NEW_TOKENS = 16
    return module.load_llm(str(folder))(request, seed)


def test_a_model_that_thinks_first_is_told_not_to_or_seen_through(tmp_path):
    """A template that opens the thinking: the answer begins within it."""
    thinks = "{{ messages[0].content }}<think>\n"
    told = "{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}"
    answer = ask(llm_folder(tmp_path / "thinks", thinks), "List")["answer"]
    assert answer.startswith("<think>")
    answer = ask(llm_folder(tmp_path / "told", thinks + told), "List")["answer"]
    assert not answer.startswith("<think>")


def test_a_model_without_a_template_gets_the_request_as_it_is(tmp_path):
    """Then it answers as with a template that adds nothing but the first token."""
    same = llm_folder(tmp_path / "same", "<|im_start|>{{ messages[0]['content'] }}")
    assert ask(llm_folder(tmp_path / "plain"), "a photo of", 3) == ask(same, "a photo of", 3)


# ---------------------------------------------------------------------------- broken models
@pytest.mark.parametrize("template, words", [
    ("{% if x %}", "TemplateSyntaxError"), ("{{ raise_exception('no') }}", "TemplateError: no"),
    ("{{ messages[0].content.text() }}", "UndefinedError")])
def test_a_broken_chat_template_is_named(say, tmp_path, template, words):
    message = say("01_prompts", f"--LLM={llm_folder(tmp_path / 'llm', template)}")
    assert message.startswith(f"01_prompts.py: LLM={tmp_path}/llm cannot answer ({words}")
    assert "chat template" in message and len(message.splitlines()) == 2


def test_weights_that_are_no_numbers_are_named(say, tmp_path):
    folder = llm_folder(tmp_path / "llm")
    path = folder / "model.safetensors"
    broken = {name: weight * torch.nan for name, weight in load_file(path).items()}
    save_file(broken, path, {"format": "pt"})
    message = say("01_prompts", f"--LLM={folder}")
    assert "llm cannot answer (RuntimeError: probability tensor contains" in message
    assert [path.name for path in (tmp_path / "run/01_prompts").glob("[!.]*")] == ["run.json"]


@pytest.mark.parametrize("gone", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_model_that_lacks_a_file_is_named(say, tmp_path, gone):
    folder = llm_folder(tmp_path / "llm")
    (folder / gone).unlink()
    message = say("01_prompts", f"--LLM={folder}")
    assert f"LLM={folder} could not be loaded" in message and len(message.splitlines()) == 2


def test_a_model_that_is_not_there_is_reported_within_a_second(say, tmp_path, capfd):
    import transformers  # noqa: F401   whose import is not counted
    for name in ("Qwen/Qwen3-4B-Instruct-2507", "./llm"):
        since = time.process_time()
        message = say("01_prompts", f"--LLM={name}")
        seconds = time.process_time() - since
        assert f"LLM={name} could not be loaded" in message and "hf auth login" in message
    assert seconds < 1 and not (tmp_path / "run").exists()
    assert "ERROR" not in capfd.readouterr().err
