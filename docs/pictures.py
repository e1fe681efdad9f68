"""The figure of each probe's page: `python docs/pictures.py` writes them to docs/pictures (some minutes; needs
`lens-probes[demo,export]`). `python docs/pictures.py RankShift LogitLens` writes these only.

The page shows the code that is run here. Figures of long experiments are drawn from saved results.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import lens_probes as lp

FOLDER = Path(__file__).parent / "pictures"
COLOURS = 256

MODEL = 'model = lp.load_model("smollm2-135m")\n'
TEXTS = MODEL + "texts = lp.demo.sentences()[:30]\n"
MARY = MODEL + 'text = "When Mary and John went to the store, John gave a drink to"\n'
TOPICS = MODEL + "topics = {topic: texts[:15] for topic, texts in lp.demo.topics().items()}\n"
IMAGES = (
    "import torch\n\n"
    + MODEL
    + "blobs = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))\n"
    + 'images = torch.nn.functional.interpolate(blobs, 32, mode="bicubic").clamp(0, 1)\n'
    + "stem = lp.stems.orthogonal(model, patch=8)\n"
)
PICTURES = {
    "AttentionPair": MODEL + "pairs = lp.demo.pronoun_pairs()\n"
    "result = lp.AttentionPair(pairs.query, pairs.keys).run(model, pairs.texts)\n"
    "result.figure_test(result.contrast())",
    "AttentionPatterns": TEXTS + 'lp.AttentionPatterns().run(model, texts).figure("previous_token")',
    "CrossAttention": 'model = lp.tiny.bridge("bart")  # random weights: the demo model has no encoder\n'
    'pair = lp.Prompt("Time flies like an arrow.", target="Die Zeit vergeht wie im Flug.")\n'
    "lp.CrossAttention().run(model, [pair]).figure()",
    "DirectLogitAttribution": MARY
    + 'result = lp.DirectLogitAttribution(target=" Mary", against=" John", positions=-1).run(model, text)\n'
    "result.figure_token(token=-1)",
    "EmbeddingDensity": TEXTS + "lp.EmbeddingDensity().run(model, texts).figure()",
    "HeadTopicSimilarity": TOPICS + "lp.HeadTopicSimilarity().run(model, topics).figure()",
    "HeadValueRank": TEXTS + "lp.HeadValueRank(layers=range(0, 30, 5)).run(model, texts[:12]).figure()",
    "KeyValueOverlap": MODEL + 'lp.KeyValueOverlap().run(model, "any prompt").figure()',
    "LayerSkip": TEXTS + "lp.LayerSkip(layers=range(0, 30, 5)).run(model, texts[:8]).figure()",
    "LensComparison": TEXTS
    + "tuned = lp.TunedLens(steps=10, layers=[0, 10, 20], tokens_per_step=32).run(model, texts[:20])\n"
    'lp.LensComparison({"tuned lens": tuned}, layers=[0, 10, 20]).run(model, texts[20:]).figure()',
    "LogitLens": TEXTS + "lp.LogitLens(layers=range(2, 30, 3)).run(model, texts).figure(prompt=4)",
    "MassiveActivations": TEXTS + "lp.MassiveActivations().run(model, texts).figure()",
    "MaxActivatingExamples": TEXTS
    + "result = lp.MaxActivatingExamples(layers=[20], units=range(8), k=8).run(model, texts)\n"
    "result.figure(layer=20, unit=3)",
    "UnitActivation": TEXTS + "lp.UnitActivation(layers=[20]).run(model, texts).figure(layer=20, prompt=4)",
    "RankShift": TEXTS + "mean = lp.ResidualMean().run(model, texts)\n"
    "lp.RankShift(center=mean).run(model, texts).figure()",
    "ResidualMean": TEXTS + "lp.ResidualMean().run(model, texts).figure()",
    "ResidualUpdate": TEXTS + "lp.ResidualUpdate().run(model, texts).figure()",
    "SourceAttribution": MARY
    + 'probe = lp.SourceAttribution(target=" Mary", against=" John", positions=-1, layers=[23])\n'
    "probe.run(model, text).figure_token(layer=23, token=-1)",
    "StateDimension": TEXTS + "lp.StateDimension().run(model, texts).figure()",
    "Summary": TEXTS + "lp.Summary(lp.RankShift()).run(model, texts).figure()",
    "TopicActivity": TOPICS + 'lp.TopicActivity(component="attn_out").run(model, topics).figure()',
    "AttentionWindow": TEXTS + "lp.AttentionWindow(radii=[1, 2, 4, 8, 16]).run(model, texts[:12]).figure()",
    "FeatureVisualization": IMAGES.replace("rand(2", "rand(8")
    + "lp.FeatureVisualization(5, units=[3, 5], stem=stem, steps=30).run(model, images).figure()",
    "HeadAblation": TEXTS + "lp.HeadAblation(steps=5, draws=3).run(model, texts[:12]).figure()",
    "ImageReconstruction": IMAGES
    + 'lp.ImageReconstruction(0, at="resid_mid", stem=stem, steps=100).run(model, images).figure()',
    "InputReconstruction": "# lp.InputReconstruction(15).run(model, texts), saved\n"
    'result = lp.load(lp.demo.saved() / "reconstruction_gradient_trained_15.safetensors")\n'
    "result.figure()",
    "MaxActivatingTokens": MODEL + 'text = "Time flies like"\n'
    "lp.MaxActivatingTokens(layer=1, units=[2, 3, 5], steps=20).run(model, text).figure()",
    "PositionReach": "# lp.PositionReach().run(model, texts), saved\n"
    'result = lp.load(lp.demo.saved() / "reach_trained.safetensors")\n'
    "result.figure()",
    "TiedKeyValue": TEXTS + 'lp.TiedKeyValue(at="layer", layers=range(0, 30, 5)).run(model, texts[:16]).figure()',
    "TopicAblation": "# lp.TopicAblation().run(model, lp.demo.topics()), saved\n"
    'result = lp.load(lp.demo.saved() / "topic_ablation_neuron.safetensors")\n'
    "result.figure()",
    "TunedLens": TEXTS + "lp.TunedLens(steps=20, layers=[0, 10, 20], tokens_per_step=32).run(model, texts).figure()",
}


def drawn(code: str) -> Any:
    """The figure that the last line makes."""
    *lines, last = code.splitlines()
    names: dict[str, Any] = {"lp": lp}
    exec("\n".join(lines), names)
    return eval(last, names)


def write(figure: Any, path: Path) -> None:
    """A small PNG: figures have few colours, and of these a thin line must keep its own."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large.png"
        figure.write_image(large)
        Image.open(large).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1).save(
            path, optimize=True
        )


def main(names: list[str]) -> None:
    """Draw these, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        write(drawn(PICTURES[name]), FOLDER / f"{name}.png")
        print(f"{name}: {(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
