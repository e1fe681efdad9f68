"""The table of published claims: `python benchmarks/claims.py` writes docs/claims.md.

A notebook with verdicts ends with a table whose columns are `COLUMNS`. It is read from the stored output, and nothing
is computed here. A claim that no notebook tests is in `NOT_TESTED`, with the reason.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
COLUMNS = ["claim", "model", "verdict", "measured", "n", "null"]

SOURCES = {
    "C": '"Paying Attention, Part 2" and later posts (github.com/danavery/attention-encodings), on RoBERTa',
    "P": 'figures and Table 3 of "Attention Is All You Need" (arXiv 1706.03762), and an idea of its readers (P5)',
    "M": '"Searching for Modularity in Large Language Models" (LessWrong, 2022), its comments, and arXiv 2403.01267, '
    "2408.17322 and 2408.17324, on OPT and others",
    "Q": '"How to Think About Self-Attention Intuitively" (Henry Dashwood), a toy of four dimensions',
    "V, T, R, W, F, A": '"Language Model Representations and Features" (blbadger.github.io), on GPT-2 and Llama; V1 to '
    "V4 are about images",
}

CLAIMS = {
    "C1": "The cosine with the own embedding drifts quickly in the first half, and walks back a little later.",
    "C2": "Ranks are stable until a final jump; content words move, function words do not.",
    "C3": "At one middle layer function words leap away, and are back at the next.",
    "C4": "Single tokens make excursions at single layers.",
    "C5": "Content words are in denser regions of the vocabulary.",
    "C6": "Adding positions to the vocabulary makes a small difference.",
    "C7": "Cosine, rank and neighbour overlap tell three different stories.",
    "C8": "In a deeper model the drift is steady, and in the last third nearly all tokens rank far away.",
    "C9": "Heads of the first layer put out what is closer to another token of the sentence than to any entry.",
    "P1": "Some heads attend to distant tokens (figure 3).",
    "P2": "Some heads resolve anaphora (figure 4).",
    "P3": "Some heads follow the structure of the sentence (figure 5).",
    "P4": "One head is worse than eight, and so are too many (Table 3 A).",
    "P5": "A neighbourhood of r tokens is enough for attention.",
    "M1": "Activations are more alike within a corpus than between corpora.",
    "M2": "Heads separate topics no better than blocks.",
    "M3": "The difference between topics is mainly one bright dimension.",
    "M4": "Attention is more task-general, feed-forward layers more task-specific.",
    "M5": "Iterated pruning separates code from other text by 65 to 75 %, more so in larger models.",
    "M6": "Peak ablation often does the least damage, resampling usually the most.",
    "M7": "Neurons form task-specific clusters, which partly persist in randomly initialised models.",
    "Q1": '"it" attends much more strongly to the cat than to the mat.',
    "Q2": "One vector for key and value would face a trade-off.",
    "V1": "Patterns form from left to right and top to bottom, more so without blur and jitter.",
    "V2": "Deeper layers look more broadly.",
    "V3": "Maximising the units of one patch changes that patch and preceding ones, never later ones.",
    "V4": "A language model represents images worse than a vision transformer, yet recognisably; first rows are worst.",
    "T1": "The input of an invertible MLP is recovered exactly.",
    "T2": "The input of an MLP that is not invertible is not recovered exactly.",
    "T3": "Untrained: descent recovers the text behind one block, and gibberish behind twelve.",
    "T4": "Trained: descent finds gibberish.",
    "T5": "Restricted to the target's own words, descent is exact for one block, and for four with tuning; "
    "a larger vocabulary fails.",
    "T6": "Descent on the cosine reaches 0.96, and still finds gibberish.",
    "T7": "In a larger GPT-2 descent reaches its goal faster, and still finds gibberish.",
    "T8": "In larger models more of the text is recovered.",
    "T9": "Descent on one-hot inputs fails with L1, and works with the cosine for longer prompts.",
    "T10": "Tokens cannot be recovered from the states of other tokens in trained models.",
    "T11": "Below a threshold of features (2,202 of 4,096) no token is recovered.",
    "R13": "Early tokens matter more to the output than the causal mask alone gives them.",
    "W1": "Walks that should leave the output as it is fail in GPT-2.",
    "F1": "Features of neurons are the embedding on its way past the layers, the same in untrained models.",
    "F2": "A search of the vocabulary finds other tokens than descent, and the same ones across blocks.",
    "A1": 'The prediction after "... swish swish" is attributed to "go" and "ish".',
}

NOT_TESTED = {
    "M5": "no experiment here prunes in iterations; one round of ablation by topic is M4",
    "M6": "ablation here sets units to zero or to their mean only",
    "M7": "nothing here clusters neurons",
    "T1": "it is about a toy without tokens, not about a language model",
    "T2": "it is about a toy without tokens, not about a language model",
    "T7": "one size of model is at hand",
    "T8": "one size of model is at hand",
    "T9": "`InputReconstruction` searches embeddings; a search of one-hot inputs would be another experiment",
    "T10": "`InputReconstruction` compares the states of all tokens; some of them would be another experiment, and "
    "a model of 7B is not at hand",
    "T11": "it is a number of one prompt in Llama-7B, and no model of that width is at hand",
    "W1": "no experiment here walks along directions that leave the output as it is",
    "A1": "it is one sentence in colours, without a number or a null; `SourceAttribution` measures direct "
    "contributions of heads, not its gradient times input",
}


def rows_of(notebook: Path) -> list[dict[str, str]]:
    """The rows of every table of claims that a notebook displays, with the notebook's name."""
    rows = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            html = "".join(output.get("data", {}).get("text/html", []))
            if f"<th>{COLUMNS[0]}</th>" not in html:
                continue
            table = ElementTree.fromstring(html[html.index("<table") : html.index("</table>") + len("</table>")])
            header, *body = (["".join(each.itertext()) for each in row] for row in table.iter("tr"))
            if header[1:] == COLUMNS:  # the first column is the row's number
                rows += [dict(zip(COLUMNS, row[1:], strict=True), notebook=notebook.stem) for row in body]
    return rows


def page() -> str:
    """The whole page."""
    found = [row for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")) for row in rows_of(notebook)]
    tested = {row["claim"] for row in found}
    if tested | NOT_TESTED.keys() != CLAIMS.keys() or tested & NOT_TESTED.keys():
        raise ValueError(
            f"every claim must be in a notebook or in NOT_TESTED, not in both; got neither or both for "
            f"{sorted((tested ^ NOT_TESTED.keys()) ^ CLAIMS.keys())}: run the notebooks, or change the lists"
        )
    lines = [
        "# Published claims, and what we measured",
        "",
        "One row per claim. The notebooks compute verdicts, numbers, n and nulls; `python benchmarks/claims.py` puts "
        "them here. Most claims were published about other models than ours (SmolLM2-135M, MiniLM-L6), so a verdict "
        "says whether a claim is general, not whether it is true of the original. Intervals are 95 %.",
        "",
        *(f"- **{letters}**: {source}." for letters, source in SOURCES.items()),
        "",
        "| id | claim | verdict | measured | n | null | notebook |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim, words in CLAIMS.items():
        own = [row for row in found if row["claim"] == claim]
        if own:
            verdict, measured = (joined(f"{row['model']}: {row[column]}" for row in own) for column in COLUMNS[2:4])
            n, null = (joined(row[column] for row in own) for column in COLUMNS[4:])
            links = joined(f"[{row['notebook']}](../notebooks/{row['notebook']}.ipynb)" for row in own)
        else:
            verdict, measured, n, null, links = f"not tested, because {NOT_TESTED[claim]}", "", "", "", ""
        lines.append(f"| {' | '.join((claim, words, verdict, measured, n, null, links))} |")
    return "\n".join(lines) + "\n"


def joined(cells: Iterable[str]) -> str:
    """Cells of several rows in one, each text once."""
    return "<br>".join(dict.fromkeys(cell.replace("|", "\\|") for cell in cells))


def main() -> None:
    (ROOT / "docs" / "claims.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
