"""TopicAblation on SmolLM2 at full size: `python benchmarks/topic_ablation.py` saves what notebooks/topics.ipynb loads.

Every third of the 600 prompts, 20 a topic; chosen on three templates and measured on the other three, 20 random draws
a topic: 421 passes over 100 prompts, for neurons and for heads, half an hour each on two quiet cores. Not part of
`make bench`.
"""

import lens_probes as lp

SAVED = lp.demo.saved()
NEURONS, HEADS = lp.TopicAblation(component="neuron", k=50), lp.TopicAblation(component="head", k=5)


def main() -> None:
    model = lp.load_model("smollm2-135m")
    topics, groups = lp.demo.topics(), iter(lp.demo.templates())
    rows = [(topic, text, next(groups)) for topic, texts in topics.items() for text in texts][::3]
    prompts = [lp.Prompt(text=text, topic=topic) for topic, text, _ in rows]
    for experiment in (NEURONS, HEADS):
        result = experiment.run(model, prompts, groups=[group for _, _, group in rows])
        result.save(SAVED / f"topic_ablation_{experiment.component}.safetensors")
        print(result.specificity().to_string())


if __name__ == "__main__":
    main()
