"""Activation analysis for TransformerLens: a measurement with a baseline, in two lines, and a picture.

    import lens_probes as lp
    result = lp.RankShift().run(model, ["Time flies like an arrow.", "Fruit flies like a banana."])
    result.figure()

`model` is a HookedTransformer (TransformerLens 3.x) or a TransformerBridge (3.x and 4.x). `list_probes()` lists the
probes, those of installed plugins too; `load_model()` gives a small real model that needs no model hub.
"""

import importlib.metadata as _metadata

from lens_probes import demo, figures, inference, tiny, toy, words
from lens_probes.demo import load_model
from lens_probes.experiments.head_count import HeadCount, HeadCountResult
from lens_probes.experiments.input_reconstruction import InputReconstruction, InputReconstructionResult
from lens_probes.experiments.neuron_features import NeuronFeatures, NeuronFeaturesResult
from lens_probes.experiments.pixel_features import PixelFeatures, PixelFeaturesResult
from lens_probes.experiments.position_reach import PositionReach, PositionReachResult
from lens_probes.experiments.tied_key_value import TiedKeyValue, TiedKeyValueResult
from lens_probes.experiments.topic_ablation import TopicAblation, TopicAblationResult
from lens_probes.experiments.tuned_lens import TunedLens, TunedLensResult
from lens_probes.model import ModelView, untrained
from lens_probes.probe import Experiment, Probe
from lens_probes.probes.attention_map import AttentionMap, AttentionMapResult
from lens_probes.probes.attention_pair import AttentionPair, AttentionPairResult
from lens_probes.probes.component_lens import ComponentLens, ComponentLensResult
from lens_probes.probes.density import Density, DensityResult
from lens_probes.probes.head_topic_similarity import HeadTopicSimilarity, HeadTopicSimilarityResult
from lens_probes.probes.key_value_overlap import KeyValueOverlap, KeyValueOverlapResult
from lens_probes.probes.logit_lens import LogitLens, LogitLensResult
from lens_probes.probes.movement import Movement, MovementResult
from lens_probes.probes.rank_shift import RankShift, RankShiftResult
from lens_probes.probes.residual_mean import ResidualMean, ResidualMeanResult
from lens_probes.probes.topic_activity import TopicActivity, TopicActivityResult
from lens_probes.prompts import Prompt, PromptTable, Table, Tokens
from lens_probes.registry import list_probes
from lens_probes.result import Provenance, Result
from lens_probes.run import Reading, run
from lens_probes.vectors import VectorReading, neuron_vectors, ov_vectors, read_vector

__version__ = _metadata.version("lens-probes")

__all__ = [
    "AttentionMap",
    "AttentionMapResult",
    "AttentionPair",
    "AttentionPairResult",
    "ComponentLens",
    "ComponentLensResult",
    "Density",
    "DensityResult",
    "Experiment",
    "HeadCount",
    "HeadCountResult",
    "HeadTopicSimilarity",
    "HeadTopicSimilarityResult",
    "InputReconstruction",
    "InputReconstructionResult",
    "KeyValueOverlap",
    "KeyValueOverlapResult",
    "LogitLens",
    "LogitLensResult",
    "ModelView",
    "Movement",
    "MovementResult",
    "NeuronFeatures",
    "NeuronFeaturesResult",
    "PixelFeatures",
    "PixelFeaturesResult",
    "PositionReach",
    "PositionReachResult",
    "Probe",
    "Prompt",
    "PromptTable",
    "Provenance",
    "RankShift",
    "RankShiftResult",
    "Reading",
    "ResidualMean",
    "ResidualMeanResult",
    "Result",
    "Table",
    "TiedKeyValue",
    "TiedKeyValueResult",
    "Tokens",
    "TopicAblation",
    "TopicAblationResult",
    "TopicActivity",
    "TopicActivityResult",
    "TunedLens",
    "TunedLensResult",
    "VectorReading",
    "demo",
    "figures",
    "inference",
    "list_probes",
    "load_model",
    "neuron_vectors",
    "ov_vectors",
    "read_vector",
    "run",
    "tiny",
    "toy",
    "untrained",
    "words",
]


def __dir__() -> list[str]:
    return __all__
