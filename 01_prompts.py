"""
01_prompts: ask a chat LLM for descriptions of street photographs, and keep the lines that are one (paper 3.2).

    in    LLM                               a chat model: hub id or folder of transformers
    out   RUN/01_prompts/prompts.txt        N_PROMPTS lines "a photo of X in Z"; edit it freely, or write your own
          RUN/01_prompts/synonyms.json      other words for each class, from the LLM too
          RUN/01_prompts/raw.jsonl          everything it said: a stopped run reads it again and goes on
    time  toy: see README; Llama-2 on one GPU: not run here

The paper's request names all classes and asks for 100 prompts. Any LLM also echoes the template, repeats itself, loops, forgets
the class or is cut off, so a parser stands behind it: X must name a class or a synonym, Z says place, light or weather.
The request is repeated with another seed until there are enough distinct lines, and with only the classes that nobody has
named yet as long as there are such (the official list never names fence, pole, terrain, sky or rider).

Healthy if most lines are kept and every class is named: the last lines of the output say both."""
import json
import re
import time
from collections import Counter
from pathlib import Path

import common
from common import CLASSES, PLACE, RUN, SCENES, SYNONYMS, Stop, preset

# ---------------------------------------------------------------------------- constants
LLM = preset(toy="tests/toy/weights/llm", paper="meta-llama/Llama-2-70b-chat-hf")    # any chat model does; -7b and -13b fit one GPU
OUT = f"{RUN}/01_prompts"
N_PROMPTS = preset(toy=60, paper=100)             # paper 3.2
TEMPERATURE = preset(toy=1.0, paper=0.7)          # lower repeats itself, higher forgets the template
TOP_P = preset(toy=1.0, paper=0.95)               # below 1 the miniature never says "the sky": a rare word is cut off, however often it is asked for
NEW_TOKENS = preset(toy=400, paper=3_000)         # a list of 100 lines has about 2,000
OFFLOAD = False                                   # what does not fit the GPU waits in the CPU's memory, slowly; needs the package accelerate
TRIES = 60                                        # answers at most; then it says what was missing
SEED = 0


# ---------------------------------------------------------------------------- what is asked
def prompt_request(classes):
    """The paper's request (3.2), with C = the given classes."""
    return (f"I want a list of prompts that can be used by an image generation model to generate synthetic images of {SCENES}. "
            'The prompt should strictly follow this template: "a photo of X in Z" where X contains one or multiple class names within '
            f"[{', '.join(classes)}] and Z describes the place, the light or the weather. Can you provide 100 diverse and simple prompts.")


def synonym_request(name):
    return f'List words that mean the same as "{name}" in a photo of {PLACE}, one a line.'


# ---------------------------------------------------------------------------- what is kept
def word_table(*tables):
    """{word: class} of class names, the words of the tables {class: words} and all plurals, lower case. What comes first wins: a weak LLM can't rename a class."""
    found = {}
    for table in ({name: (name,) for name in CLASSES}, *tables):
        for name in CLASSES:
            for word in table.get(name, ()):
                plural = {"person": "people", "man": "men", "woman": "women", "child": "children"}.get(word, word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s"))
                for form in (word, plural):
                    found.setdefault(form.lower(), name)
    return found


def classes_in(text, table):
    """The classes that a text names by whole words. The longest word wins: 'traffic light' is not also 'light'."""
    found, rest = set(), text.lower()
    for word in sorted(table, key=lambda w: (-len(w), w)):
        rest, n = re.subn(rf"(?<![a-z]){re.escape(word)}(?![a-z])", " ", rest)
        if n:
            found.add(table[word])
    return found


def parse(line, table):
    """One line of an answer -> ("a photo of x in z", its classes), or (None, why it is dropped)."""
    text = re.sub(r"^\s*(?:[-*•]+|\(?\d+[.):])\s*", "", line).replace("**", "").strip(" \t\"'“”‘’`")
    text = re.sub(r"\s+", " ", text).rstrip(".,;:!\"'”").strip()
    match = re.fullmatch(r"an? photo of (.+?) in (.+)", text, re.IGNORECASE)
    if not match:
        return None, "not 'a photo of X in Z'"
    x, z = match.groups()
    if re.search(r"\b[XZ]\b", f"{x} {z}"):
        return None, "echo of the template"
    words = f"{x} {z}".lower().split()
    if len(words) > 30 or max(map(len, words)) > 20 or max(Counter(zip(words, words[1:])).values(), default=0) > 2:
        return None, "loop"
    named = classes_in(x, table)
    if not named:
        return None, "no class in X"
    return f"a photo of {x} in {z}", named


def parse_synonyms(answer):
    """The usable lines of an answer: one to three plain words that are no other class's name, at most five."""
    found = []
    for line in answer.splitlines():
        word = re.sub(r"^\s*(?:[-*•]+|\(?\d+[.):])\s*", "", line).strip(" \t\"'*.,").lower()
        if re.fullmatch(r"[a-z]+(?: [a-z]+){0,2}", word) and len(word) <= 25 and word not in CLASSES and word not in found and line.lstrip()[:1] in "-*•0123456789(":
            found.append(word)
    return found[:5]


class Collector:
    """Keeps distinct prompts up to n. While `fair`, places are kept free for the classes that nobody has named yet."""

    def __init__(self, n, table):
        self.n, self.table, self.kept, self.named, self.dropped, self.fair = n, table, {}, Counter(), Counter(), True

    @property
    def missing(self):
        return [name for name in CLASSES if not self.named[name]]

    def add(self, answer, cut):
        """Take the lines of an answer. cut: the last line broke off at the token limit."""
        lines = [line for line in answer.splitlines() if line.strip()]
        for i, line in enumerate(lines):
            prompt, found = parse(line, self.table)
            if cut and i == len(lines) - 1:
                prompt, found = None, "cut off"
            elif prompt and prompt.lower() in self.kept:
                prompt, found = None, "repeated"
            elif prompt and self.fair and len(self.kept) + len(self.missing) >= self.n and not found & set(self.missing):
                prompt, found = None, "enough of these"
            if prompt is None:
                self.dropped[found] += 1
            elif len(self.kept) < self.n:
                self.kept[prompt.lower()] = prompt
                self.named.update(found)


def load_llm(name):
    """-> answer(request, seed) -> (text, cut). Any chat model of transformers; a model without a chat template gets the request as it is."""
    common.hub_or_offline()
    folder = common.model_folder(name)
    with common.from_hub(f"the LLM {name}", "Llama-2 is gated: accept its licence on its page and log in with `hf auth login`.\n"
                                            "  Open chat models do as well, as --LLM=Qwen/Qwen2.5-7B-Instruct or mistralai/Mistral-7B-Instruct-v0.3, or a folder.\n"
                                            "  Without any: write RUN/01_prompts/prompts.txt by hand, one prompt a line, and go on with 02"):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        device = common.device()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device_map="auto" if OFFLOAD else None).eval()
        model = model if OFFLOAD else model.to(device)

    def answer(request, seed):
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template([{"role": "user", "content": request}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        else:
            inputs = tokenizer(request, return_tensors="pt")
        torch.manual_seed(seed)
        with torch.no_grad():
            out = model.generate(**inputs.to(model.device), do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=NEW_TOKENS,
                                 pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
        new = out[0, inputs["input_ids"].shape[1]:]
        return tokenizer.decode(new, skip_special_tokens=True), len(new) >= NEW_TOKENS
    return answer


def main():
    run = common.Run(globals(), "prompts.txt", free=("TRIES",))
    if run.finished():
        return
    if N_PROMPTS < 1:
        raise Stop(f"--N_PROMPTS={N_PROMPTS}: at least one prompt is needed")
    answer = load_llm(LLM)
    run.start()
    said = Path(OUT) / "raw.jsonl"
    before = []
    if said.exists():                               # a line that a kill cut in two is asked again, and so is all behind it
        for line in said.read_text().splitlines():
            try:
                before.append(json.loads(line))
            except ValueError:
                break
        print(f"goes on after {len(before)} answers")
        with common.whole(said) as part:
            part.write_text("".join(json.dumps(turn) + "\n" for turn in before))

    def ask(turn, request):
        """The answer of this turn: from raw.jsonl if it is there, otherwise from the LLM, with a seed of its own."""
        if turn >= len(before):
            text, cut = answer(request, SEED + turn)
            with open(said, "a") as file:
                file.write(json.dumps({"turn": turn, "request": request, "answer": text, "cut": cut}) + "\n")
            return text, cut
        return before[turn]["answer"], before[turn]["cut"]

    synonyms = {name: parse_synonyms(ask(turn, synonym_request(name))[0]) for turn, name in enumerate(CLASSES)}
    common.write_json(Path(OUT) / "synonyms.json", synonyms)
    found = Collector(N_PROMPTS, word_table(SYNONYMS, synonyms))
    for turn in range(len(CLASSES), len(CLASSES) + TRIES):
        found.fair = turn < len(CLASSES) + TRIES // 2
        wanted = found.missing if turn % 2 and found.kept and found.missing else CLASSES
        since = time.time()
        text, cut = ask(turn, prompt_request(wanted))
        found.add(text, cut)
        print(f"answer {turn - len(CLASSES) + 1}: {len(found.kept)} prompts, {time.time() - since:.1f} s; not named yet: {', '.join(found.missing) or 'none'}", flush=True)
        if len(found.kept) == N_PROMPTS:
            break
    report = f"{len(found.kept)} kept; dropped: " + (", ".join(f"{n} {why}" for why, n in found.dropped.most_common()) or "none")
    if len(found.kept) < N_PROMPTS:
        raise Stop(f"{TRIES} answers gave {report}; never named: {', '.join(found.missing) or 'none'}.\n  More answers: --TRIES={2 * TRIES} (nothing is asked twice). A better LLM: --LLM=... --OUT=...")
    if found.missing:
        print(f"warning: no prompt names {', '.join(found.missing)}; add a line to {run.result} by hand")
    print(report + "\nnamed: " + ", ".join(f"{name} {found.named[name]}" for name in CLASSES))
    run.finish(kept=len(found.kept), dropped=dict(found.dropped), named=dict(found.named))
    with common.whole(run.result) as part:
        part.write_text("".join(prompt + "\n" for prompt in found.kept.values()))


if __name__ == "__main__":
    common.launch(globals())
