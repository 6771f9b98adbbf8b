"""English pronunciations of the package: a compact CMU dictionary and letter-to-sound trees.

``python -m tessera.training.lexicon cmudict.dict.gz`` writes ``modalities/english.lexicon.xz`` and
``modalities/english.rules.xz``. With ``--evaluate`` a twentieth of the words is held out of the
trees, nothing is written, and the phone and word error rates on them are printed (0.089 and 0.363).
``--transcripts transcripts.jsonl`` prints how far the phones of recorded prompts (rows with ``text``
and ``phones``) differ from those of `phonemise`.

The trees follow Black, Lenzo and Pagel, "Issues in building general letter to sound rules" (1998):
letters are aligned with the phones they stand for by expectation maximisation, then one tree a
letter asks about the letters around it. Ours read a word from its end to its start, so that a tree
also asks what the letters behind it sound like.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ..modalities.phonemes import (
    FOLLOWING,
    LEXICON,
    RULES,
    LetterToSound,
    pack,
    phonemise,
    questions,
)

LONGEST_CHUNK = 2
"""Phones that one letter can stand for (x: k s)."""


def read_cmudict(path: str | Path) -> dict[str, list[str]]:
    """Word -> phones of its first pronunciation: lower case, no stress, AH0 as ax."""
    words: dict[str, list[str]] = {}
    with gzip.open(path, "rt", encoding="utf8") as lines:
        for line in lines:
            word, *phones = line.split("#")[0].split()
            if not word.endswith(")"):
                words[word] = [
                    "ax" if phone == "AH0" else phone.rstrip("012").lower() for phone in phones
                ]
    return words


def align(
    words: list[tuple[str, str]], rounds: int = 4, sample: int = 4
) -> dict[str, tuple[str, ...]]:
    """Cut each word's packed phones into one chunk (0 to 2 phones) a letter.

    Viterbi training: every ``sample``-th word in the rounds, all words in the last. Words without
    such a cut (spelt-out letters) are left out.
    """
    score: dict[tuple[str, str], float] = {}

    def cut(word: str, phones: str) -> tuple[str, ...] | None:
        best: list[dict[int, tuple[float, str]]] = [{0: (0.0, "")}]
        for i, letter in enumerate(word):
            row: dict[int, tuple[float, str]] = {}
            left = LONGEST_CHUNK * (len(word) - i - 1)
            for j, (total, _) in best[-1].items():
                for k in range(LONGEST_CHUNK + 1):
                    if j + k > len(phones) or len(phones) - j - k > left:
                        continue
                    chunk = phones[j : j + k]
                    value = total + score.get((letter, chunk), -12.0 - 2.0 * k)
                    if not score:  # First round: near the diagonal, one phone a letter.
                        value = total - abs((j + k) / len(phones) - (i + 1) / len(word)) - (k > 1)
                    if j + k not in row or value > row[j + k][0]:
                        row[j + k] = (value, chunk)
            best.append(row)
        if len(phones) not in best[-1]:
            return None
        chunks, j = [], len(phones)
        for row in reversed(best[1:]):
            chunks.append(row[j][1])
            j -= len(chunks[-1])
        return tuple(reversed(chunks))

    for _ in range(rounds):
        counts: Counter[tuple[str, str]] = Counter()
        for word, phones in words[::sample]:
            if chunks := cut(word, phones):
                counts.update(zip(word, chunks, strict=True))
        letters: Counter[str] = Counter()
        for (letter, _), count in counts.items():
            letters[letter] += count
        score = {
            pair: math.log(count / letters[pair[0]]) for pair, count in counts.items() if count >= 3
        }
    found = {word: chunks for word, phones in words if (chunks := cut(word, phones))}
    rare = {pair for pair, count in _pairs(found).items() if count < 5}
    return {w: c for w, c in found.items() if rare.isdisjoint(zip(w, c, strict=True))}


def _pairs(aligned: dict[str, tuple[str, ...]]) -> Counter[tuple[str, str]]:
    return Counter(
        pair for word, chunks in aligned.items() for pair in zip(word, chunks, strict=True)
    )


def grow(examples: np.ndarray, answers: np.ndarray, smallest: int, gain: float) -> list:
    """A tree as a preorder list: (question, value) of an inner node, or the answer of a leaf.

    Args:
        examples: ``[N, Q]`` small ints, the value of each question.
        answers: ``[N]`` small ints.
        smallest: examples that a side of a split must have.
        gain: least fall of the Gini impurity, in examples.
    """
    num_values, num_answers = int(examples.max()) + 1, int(answers.max()) + 1
    num_questions = examples.shape[1]
    offsets = np.arange(num_questions) * num_values
    tree: list = []
    stack = [np.arange(len(answers))]
    while stack:
        rows = stack.pop()
        here = answers[rows]
        total = np.bincount(here, minlength=num_answers).astype(float)
        split = None
        if len(rows) >= 2 * smallest and total.max() < len(rows):
            kinds, here = np.unique(here, return_inverse=True)
            cells = (examples[rows] + offsets) * len(kinds) + here[:, None]
            size = num_questions * num_values
            yes = np.bincount(cells.ravel(), minlength=size * len(kinds))
            yes = yes.reshape(size, len(kinds)).astype(float)
            no = total[kinds] - yes
            n_yes, n_no = yes.sum(1), no.sum(1)
            good = (n_yes >= smallest) & (n_no >= smallest)
            purity = (yes**2).sum(1) / np.maximum(n_yes, 1) + (no**2).sum(1) / np.maximum(n_no, 1)
            purity = np.where(good, purity, -1.0)
            best = int(purity.argmax())
            if purity[best] - (total**2).sum() / len(rows) >= gain:
                split = divmod(best, num_values)
        if split is None:
            tree.append(int(total.argmax()))
            continue
        tree.append(split)
        yes_side = examples[rows, split[0]] == split[1]
        stack += [rows[~yes_side], rows[yes_side]]
    return tree


def letter_to_sound(
    aligned: dict[str, tuple[str, ...]], smallest: int = 1, gain: float = 0.9
) -> str:
    """The trees of all letters, as the text that `LetterToSound` reads."""
    chunks = sorted({chunk for cut in aligned.values() for chunk in cut})
    index = {chunk: i for i, chunk in enumerate(chunks)}
    rows: dict[str, list[list[str]]] = defaultdict(list)
    targets: dict[str, list[int]] = defaultdict(list)
    for word, cut in aligned.items():
        for i, letter in enumerate(word):
            rows[letter].append(questions(word, i, cut[i + 1 : i + 1 + FOLLOWING]))
            targets[letter].append(index[cut[i]])
    lines = [" ".join(chunk or "-" for chunk in chunks)]
    for letter in sorted(rows):
        table = rows.pop(letter)
        values = sorted({value for row in table for value in row})
        number = {value: i for i, value in enumerate(values)}
        examples = np.array([[number[value] for value in row] for row in table])
        tree = grow(examples, np.array(targets.pop(letter)), smallest, gain)
        nodes = [
            f"{node[0]}{values[node[1]]}" if isinstance(node, tuple) else f"={node}"
            for node in tree
        ]
        lines.append(letter + " " + " ".join(nodes))
    return "\n".join(lines)


def edit_distance(a: list[str], b: list[str]) -> int:
    """Insertions, deletions and substitutions between two lists."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def evaluate(rules: LetterToSound, words: dict[str, list[str]]) -> tuple[float, float]:
    """Phone error rate and word error rate."""
    errors = [edit_distance(list(rules(word)), phones) for word, phones in words.items()]
    phones = sum(map(len, words.values()))
    return sum(errors) / phones, sum(map(bool, errors)) / len(words)


def disagreement(transcripts: str | Path) -> float:
    """Edits that turn `phonemise`'s phones into the transcripts', per phone; each text once."""
    with open(transcripts, encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = {row["text"]: row["phones"] for row in rows if "phones" in row}
    errors = 0
    for text, phones in prompts.items():
        first, *more = phonemise(text)
        ours = [*first.phones, *(phone for sentence in more for phone in sentence.phones[1:])]
        errors += edit_distance(ours, phones)
    return errors / sum(map(len, prompts.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cmudict", help="cmudict.dict.gz of github.com/cmusphinx/cmudict")
    parser.add_argument(
        "--evaluate", action="store_true", help="hold out 5 % and print error rates"
    )
    parser.add_argument(
        "--transcripts", help="JSON lines with text and phones: print, write nothing"
    )
    arguments = parser.parse_args()
    if arguments.transcripts:
        print(f"phones that differ: {disagreement(arguments.transcripts):.4f}")
        return
    words = read_cmudict(arguments.cmudict)
    spelt = {word: phones for word, phones in words.items() if word.isalpha() and word.isascii()}
    held_out = {w: p for i, (w, p) in enumerate(spelt.items()) if i % 20 == 7}
    if arguments.evaluate:
        spelt = {w: p for w, p in spelt.items() if w not in held_out}
    aligned = align([(word, pack(phones)) for word, phones in spelt.items()])
    rules = letter_to_sound(aligned)
    if arguments.evaluate:
        phone_errors, word_errors = evaluate(LetterToSound(rules), held_out)
        print(f"{len(held_out):,} words: phones wrong {phone_errors:.4f}, words {word_errors:.4f}")
        return
    lexicon = "\n".join(f"{word} {pack(phones)}" for word, phones in sorted(words.items()))
    for path, text in ((LEXICON, lexicon), (RULES, rules)):
        path.write_bytes(lzma.compress(text.encode("utf8"), preset=9 | lzma.PRESET_EXTREME))
        print(f"{path.name}: {path.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
