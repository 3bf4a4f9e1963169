"""
01_prompts: ask a chat LLM to describe street photographs, keep the usable lines (paper 3.2).

    in    LLM                           a chat model of transformers: hub id or folder
    out   RUN/01_prompts/prompts.txt    N_PROMPTS lines "a photo of X in Z"; edit it freely
          RUN/01_prompts/raw.jsonl      every answer: a stopped run resumes from it; synonyms.json
    time  toy: see README. Paper: minutes on one GPU, not measured

The LLM is asked for synonyms of each class, then, each time with another seed, for 100 prompts
about all classes, and every second time only about those that no prompt names yet. LLMs repeat
themselves, loop, forget the class or are cut off, so a parser keeps distinct prompts in which X
names a class. Check: every class is named; the last lines printed have the counts."""
import re
import sys
from collections import Counter

import common
import torch
from common import CLASSES, RUN, expect, expect_kind, expect_numbers, preset
from tqdm import tqdm

# ---------------------------------------------------------------------------- constants
# in and out; the paper's Llama-2 is gated, its 70B takes 140 GB: meta-llama/Llama-2-7b-chat-hf
LLM = preset(toy=f"{common.MINIATURES}/llm", paper="Qwen/Qwen3-4B-Instruct-2507")   # Apache-2.0
OUT = f"{RUN}/01_prompts"
# request
SOURCE_CLASSES = preset(toy=tuple(CLASSES), paper=tuple(CLASSES), synthia=tuple(    # it labels 16
    name for name in CLASSES if name not in ("terrain", "truck", "train")))
SCENES = "urban street scenes"              # for classes of your own: SCENES, PLACE and WORDS
PLACE = "a street"
# sampling
N_PROMPTS = preset(toy=60, paper=100)       # paper 3.2
TEMPERATURE = preset(toy=1.0, paper=0.7)    # lower repeats itself, higher forgets the template
TOP_P = preset(toy=1.0, paper=0.95)         # below 1 the miniature never says "the sky"
NEW_TOKENS = preset(toy=400, paper=3_000)   # longest answer; a list of 100 lines has about 2,000
TRIES = 60                                  # answers at most
SEED = 0
# words for a class besides its name; a word listed twice belongs to the first class
WORDS = {
    "road": "street, avenue, highway, lane, intersection, crossing", "fence": "railing",
    "sidewalk": "pavement, footpath", "building": "house, skyscraper, tower, shop, skyline",
    "wall": "brick wall, stone wall", "pole": "lamp post, street lamp", "sky": "clouds",
    "sign": "traffic sign, traffic light", "traffic light": "traffic signal, stoplight",
    "traffic sign": "stop sign, street sign, road sign", "vegetation": "tree, bush, hedge, plants",
    "terrain": "grass, lawn, field, dirt", "rider": "cyclist, motorcyclist, biker", "bus": "coach",
    "person": "people, pedestrian, man, men, woman, women, child, children", "truck": "lorry, van",
    "car": "automobile, taxi, vehicle", "train": "tram, locomotive, streetcar",
    "motorcycle": "motorbike, scooter", "bicycle": "bike, cyclist"}
WORDS = {name: words.split(", ") for name, words in WORDS.items()}


def check():
    """Refuse what would fail late or keep nonsense in silence. Raises Stop."""
    expect_kind(str, OUT=OUT, LLM=LLM, SCENES=SCENES, PLACE=PLACE)
    expect_kind(tuple, SOURCE_CLASSES=SOURCE_CLASSES)
    known = set(SOURCE_CLASSES) & set(CLASSES)
    expect(SOURCE_CLASSES and len(known) == len(SOURCE_CLASSES),
           f"{SOURCE_CLASSES=}: expected some of {', '.join(CLASSES)}, each once")
    expect_numbers(int, 1, 100_000, N_PROMPTS=N_PROMPTS, TRIES=TRIES)
    expect_numbers(float, .01, 10, TEMPERATURE=TEMPERATURE)
    expect_numbers(float, 1e-6, 1, TOP_P=TOP_P)
    expect_numbers(int, 16, 100_000, NEW_TOKENS=NEW_TOKENS)
    expect_numbers(int, 0, 10 ** 9, SEED=SEED)
    expect(common.PROCESSES == 1, "one process is enough here: start it without torchrun")


# ---------------------------------------------------------------------------- request (3.2)
def prompt_request(classes):
    """The paper's request (3.2) with its gaps filled: C is the given classes."""
    return (f"I want a list of prompts that can be used by an image generation model to generate "
            f"synthetic images of {SCENES}. The prompt should strictly follow this template: "
            '"a photo of X in Z" where X contains one or multiple class names within '
            f"[{', '.join(classes)}] and Z describes the place, the light or the weather. "
            "Can you provide 100 diverse and simple prompts.")


def synonym_request(name):
    return f'List words that mean the same as "{name}" in a photo of {PLACE}, one a line.'


# ---------------------------------------------------------------------------- answer
def word_table(*tables):
    """{word: class} of names, then of tables {class: words}, with plurals; the first use counts."""
    found = {}
    for table in ({name: [name] for name in CLASSES}, *tables):
        for name in CLASSES:
            for word in table.get(name, ()):
                for form in (word, word + "s", word + "es"):
                    found.setdefault(form.lower(), name)
    return found


def classes_in(text, table):
    """The classes that a text names by whole words, the longest first ("traffic light")."""
    words = "|".join(sorted(map(re.escape, table), key=len, reverse=True))
    return {table[word] for word in re.findall(rf"(?<![a-z])(?:{words})(?![a-z])", text.lower())}


def parse(answer, table):
    """-> what parse_prompt() makes of each line of an answer; of each "a photo of", if the line has
    several, as "1. a photo of a car in rain 2. a photo of a bus in fog"."""
    between = r"\b(?:(?:prompt )?#?\d{1,3} ?[.):-]|and|or)\W*"        # before the second one
    found = []
    for line in filter(str.strip, answer.splitlines()):
        line = line.replace("**", "").replace("\xa0", " ")
        _, *texts = re.split(rf"(?:{between})?\ban? photo of\s", line, flags=re.IGNORECASE)
        found += [parse_prompt(text, table) for text in texts or [""]]
    return found


def parse_prompt(text, table):
    """What follows "a photo of" -> ("a photo of x in z", the classes in x), or (None, why not)."""
    remark = r"""[|<(\[{"“”`;\\]| [-–—] |(?<=[a-z]{3})[.!?:]\s"""   # begins with these
    text = re.sub(r"^\[([^]]+)\] in \[([^]]+)\]", r"\1 in \2", text)
    text = re.split(remark, text, maxsplit=1)[0]
    match = len(text) < 400 and re.fullmatch(r"(.+?) in (.+?)[\W_]*", text, re.IGNORECASE)
    if not match or re.search(r"\b[XZ]\b|\b(?:an?|the)\W*$", text):
        return None, "not 'a photo of X in Z'"
    words = " ".join(match.groups()).lower().split()
    pairs = Counter(zip(words, words[1:]))
    if len(words) > 30 or max(map(len, words)) > 20 or max(pairs.values()) > 2:
        return None, "loop"
    named = classes_in(match[1], table)
    return (f"a photo of {match[1]} in {match[2]}", named) if named else (None, "no class in X")


def parse_synonyms(answer):
    """The first five items of a list that are one to three plain words and no class's name."""
    found = re.findall(r"^[^a-z\n]+([a-z]+(?: [a-z]+){0,2})[^\w\n]*$", answer.lower(), re.MULTILINE)
    return [word for word in dict.fromkeys(found) if word not in CLASSES][:5]


def collect(answer, table, kept, missing, dropped, fair=True):
    """Add the usable prompts to kept, {prompt: its classes}, up to N_PROMPTS, and count the rest
    in dropped. While fair, places are reserved for the classes in the list missing."""
    for prompt, found in parse(answer, table):
        if prompt is None:
            dropped[found] += 1
        elif prompt.lower() in map(str.lower, kept):
            dropped["repeated"] += 1
        elif fair and len(kept) + len(missing) >= N_PROMPTS and not found & set(missing):
            dropped["enough of these"] += 1
        elif len(kept) < N_PROMPTS:
            kept[prompt] = found
            missing[:] = [name for name in missing if name not in found]


# ---------------------------------------------------------------------------- model
def load_llm(name):
    """-> function: request, seed -> {"answer", "cut": whether NEW_TOKENS ended it}. A model without
    a chat template gets the request as it is. Raises Stop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dtype = "auto" if torch.cuda.is_available() else torch.float32      # auto: that of its files
    with common.explain(f"LLM={name} could not be loaded", "Connect to the hub (if gated: hf auth "
                        "login), name another --LLM, or skip 01: 02_generate.py --PROMPTS=FILE"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    model.to(common.device())
    tokenizer.chat_template = tokenizer.chat_template or "{{bos_token}}{{messages[0].content}}"

    def llm(request, seed):
        chat = [{"role": "user", "content": request}]
        torch.manual_seed(seed)
        with common.explain(f"LLM={name} cannot answer", "Are its weights and chat template "
                            "complete? If so, name another one: --LLM=... --OUT=..."):
            # a model that thinks first is told not to; other templates ignore enable_thinking
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True,
                                                 enable_thinking=False)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
            out = model.generate(**inputs, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P,
                                 max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1]:]
            answer = tokenizer.decode(out, skip_special_tokens=True)
        thinks = "<think>" if text.rstrip().endswith("<think>") else ""
        return {"answer": thinks + answer, "cut": len(out) >= NEW_TOKENS}
    return llm


def recorded(llm, path):
    """-> function: turn, request -> the answer's whole lines; raw.jsonl keeps it. Raises Stop."""
    rows = common.read_lines(path, "request", "answer", "cut") if path.exists() else []

    def ask(turn, request):
        if turn == len(rows):
            rows.append({"request": request, **llm(request, SEED + turn)})
            common.write_lines(path, rows)
        row = rows[turn]
        expect(row["request"] == request, f"{path}, line {turn + 1}: another request than this "
               "run's. Remove the file to ask everything again, or name another --OUT")
        # what a model thinks is no answer; it may be cut off while it thinks
        answer = row["answer"].rpartition("</think>")[2].partition("<think>")[0]
        return answer.rpartition("\n")[0] if row["cut"] else answer
    return ask


def main():
    run = common.Run(globals(), "prompts.txt", free=("TRIES",))
    if run.finished():
        return
    llm = load_llm(LLM)
    run.start()
    ask = recorded(llm, run.out / "raw.jsonl")
    synonyms = {name: parse_synonyms(ask(turn, synonym_request(name)))
                for turn, name in enumerate(tqdm(SOURCE_CLASSES, "synonyms", disable=None))}
    common.write_lines(run.out / "synonyms.json", [synonyms])
    table = word_table(WORDS, synonyms)
    kept, missing, dropped = {}, list(SOURCE_CLASSES), Counter()
    for number in tqdm(range(TRIES), "answers", disable=None, dynamic_ncols=True):
        request = prompt_request(missing if number % 2 and missing else SOURCE_CLASSES)
        answer = ask(len(SOURCE_CLASSES) + number, request)
        collect(answer, table, kept, missing, dropped, fair=number < TRIES // 2)
        tqdm.write(f"answer {number + 1}/{TRIES} | {len(kept)}/{N_PROMPTS} prompts | "
                   f"not named: {', '.join(missing) or 'none'}")
        if len(kept) == N_PROMPTS:
            break
    print("dropped: " + (", ".join(f"{n} {why}" for why, n in dropped.most_common()) or "none"))
    expect(len(kept) == N_PROMPTS, f"{TRIES} answers gave {len(kept)} of {N_PROMPTS} prompts\n"
           f"  More answers: --TRIES={2 * TRIES}. A better LLM: --LLM=... --OUT=...")
    named = Counter(name for classes in kept.values() for name in classes)
    print("named: " + ", ".join(f"{name} {named[name]}" for name in CLASSES))
    run.finish(kept=len(kept), dropped=dropped, named=named)
    common.write_text(run.result, "\n".join(kept) + "\n")


if __name__ == "__main__":
    common.launch(globals())
