"""01's parser on what LLMs really write."""
import json
from pathlib import Path

import pytest

from common import CLASSES, SYNONYMS
from conftest import fresh

stage = fresh("01_prompts")
TABLE = stage.word_table(SYNONYMS)


@pytest.mark.parametrize("line, prompt", [
    ("a photo of a car in the rain", "a photo of a car in the rain"), ("12. A photo of a bus in Tokyo at noon.", "a photo of a bus in Tokyo at noon"),
    ("  * **A photo of two people in the snow**", "a photo of two people in the snow"), ('- "a photo of a road and cars in Paris on a rainy night"', "a photo of a road and cars in Paris on a rainy night"),
    ("\t3) An photo of a traffic light in fog", "a photo of a traffic light in fog"), ("a photo of many poles, two fences and a tree in a village in winter", "a photo of many poles, two fences and a tree in a village in winter")])
def test_usable_lines_in_all_their_dresses(line, prompt):
    assert stage.parse(line, TABLE)[0] == prompt


@pytest.mark.parametrize("line, why", [
    ("Sure, here are 100 diverse and simple prompts:", "not"), ("a photo of X in Z", "echo"), ('Example of the prompt: "a photo of a car in Z"', "not"), ("a photo of a car on the road", "not"),
    ("a photo of a door in a house", "no class"), ("a photo of a person with a person with a person with a person in a town", "loop"), ("a photo of apersonwithapersonwithaperson in a town", "loop"),
    ("a picture of a car in the rain", "not"), ("", "not"), ("a photo of a scar in a bustling market", "no class")])
def test_what_is_dropped_and_why(line, why):
    prompt, reason = stage.parse(line, TABLE)
    assert prompt is None and why in reason


def test_classes_are_found_by_whole_words_plurals_and_synonyms():
    assert stage.classes_in("two buses, people and bikes", TABLE) == {"bus", "person", "bicycle"}
    assert stage.classes_in("a traffic light", TABLE) == {"sign"} and stage.classes_in("a scarf, a businessman", TABLE) == set()


def test_places_are_kept_free_for_classes_that_nobody_named():
    found = stage.Collector(len(CLASSES), TABLE)
    found.add("\n".join(f"a photo of a car in town {i}" for i in range(40)), cut=False)
    assert len(found.kept) == 1 and found.dropped["enough of these"] == 39
    found.add("\n".join(f"a photo of a {name} in a town" for name in CLASSES), cut=False)
    assert not found.missing and len(found.kept) == len(CLASSES)


def test_repeats_and_the_cut_last_line_are_dropped():
    found = stage.Collector(50, TABLE)
    found.add("a photo of a car in a town\nA photo of a car in a town.\na photo of a bus in a t", cut=True)
    assert list(found.kept.values()) == ["a photo of a car in a town"] and dict(found.dropped) == {"repeated": 1, "cut off": 1}


def test_synonyms_are_short_plain_words_from_a_list():
    answer = "Here are some words:\n1. pedestrian\n2. \"walker\"\n3. a person who is walking down a street\n- car\n4. pedestrian"
    assert stage.parse_synonyms(answer) == ["pedestrian", "walker"]


def test_a_class_that_the_llm_never_names_does_not_hold_its_place_for_ever():
    found = stage.Collector(3, TABLE)
    found.fair = False
    found.add("\n".join(f"a photo of a car in town {i}" for i in range(5)), cut=False)
    assert len(found.kept) == 3 and "sky" in found.missing


def test_a_weak_llms_synonym_can_not_rename_a_class():
    table = stage.word_table(SYNONYMS, {"road": ["railing", "boulevard"], "sky": ["car"]})
    assert table["railing"] == "fence" and table["car"] == "car" and table["boulevards"] == "road"


def test_what_a_real_small_llm_wrote():
    """Eight recorded answers of SmolLM2-135M-Instruct to the request of 01: of 140 lines ten are usable."""
    found = stage.Collector(60, TABLE)
    found.fair = False
    for line in (Path(__file__).parent / "smollm2.jsonl").read_text().splitlines():
        found.add(**json.loads(line))
    kept = list(found.kept)
    assert len(kept) == 10 and kept[0] == "a photo of a person standing in front of a building" and kept[-1] == "a photo of a person in a city street with a vibrant green roof with a bright sky"
    assert dict(found.dropped) == {"not 'a photo of X in Z'": 99, "repeated": 15, "no class in X": 10, "cut off": 6}
