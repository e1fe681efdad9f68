"""Activation analysis for TransformerLens: a measurement with a baseline, in two lines, and a picture.

    import lens_probes as lp
    result = lp.RankShift().run(model, ["Time flies like an arrow.", "Fruit flies like a banana."])
    result.figure()

`model` is a HookedTransformer (TransformerLens 3.x) or a TransformerBridge (3.x and 4.x). Every probe and experiment of
the package stands here under its name; `list_probes()` lists the probes, those of installed plugins too;
`load_model()` gives a small real model that needs no model hub.
"""

import importlib.metadata as _metadata

from lens_probes import cluster, figures, stems
from lens_probes.corpus import Run, delete_run, open_run, run_corpus
from lens_probes.examples import demo, tiny, toy
from lens_probes.examples.demo import load_model
from lens_probes.experiments.attention_window import AttentionWindow, AttentionWindowResult
from lens_probes.experiments.feature_visualization import FeatureVisualization, FeatureVisualizationResult
from lens_probes.experiments.head_ablation import HeadAblation, HeadAblationResult
from lens_probes.experiments.image_reconstruction import ImageReconstruction, ImageReconstructionResult
from lens_probes.experiments.input_reconstruction import InputReconstruction, InputReconstructionResult
from lens_probes.experiments.layer_skip import LayerSkip, LayerSkipResult
from lens_probes.experiments.max_activating_tokens import MaxActivatingTokens, MaxActivatingTokensResult
from lens_probes.experiments.position_reach import PositionReach, PositionReachResult
from lens_probes.experiments.state_dimension import StateDimension, StateDimensionResult
from lens_probes.experiments.tied_key_value import TiedKeyValue, TiedKeyValueResult
from lens_probes.experiments.topic_ablation import TopicAblation, TopicAblationResult
from lens_probes.experiments.tuned_lens import TunedLens, TunedLensResult
from lens_probes.maths import inference
from lens_probes.model import EncoderView, ModelView, greedy_targets, jacobian_lens, untrained
from lens_probes.pages import Page, packed, page
from lens_probes.probe import Experiment, Probe, TextExperiment, run
from lens_probes.probes.attention_pair import AttentionPair, AttentionPairResult
from lens_probes.probes.attention_patterns import AttentionPatterns, AttentionPatternsResult
from lens_probes.probes.cross_attention import CrossAttention, CrossAttentionResult
from lens_probes.probes.direct_logit_attribution import DirectLogitAttribution, DirectLogitAttributionResult
from lens_probes.probes.embedding_density import EmbeddingDensity, EmbeddingDensityResult
from lens_probes.probes.head_topic_similarity import HeadTopicSimilarity, HeadTopicSimilarityResult
from lens_probes.probes.head_value_rank import HeadValueRank, HeadValueRankResult
from lens_probes.probes.key_value_overlap import KeyValueOverlap, KeyValueOverlapResult
from lens_probes.probes.lens_comparison import LensComparison, LensComparisonResult
from lens_probes.probes.logit_lens import LogitLens, LogitLensResult
from lens_probes.probes.massive_activations import MassiveActivations, MassiveActivationsResult
from lens_probes.probes.max_activating_examples import MaxActivatingExamples, MaxActivatingExamplesResult
from lens_probes.probes.rank_shift import RankShift, RankShiftResult
from lens_probes.probes.residual_mean import ResidualMean, ResidualMeanResult
from lens_probes.probes.residual_update import ResidualUpdate, ResidualUpdateResult
from lens_probes.probes.source_attribution import SourceAttribution, SourceAttributionResult
from lens_probes.probes.topic_activity import TopicActivity, TopicActivityResult
from lens_probes.probes.unit_activation import UnitActivation, UnitActivationResult
from lens_probes.reading import Reading
from lens_probes.registry import list_probes
from lens_probes.result import LayerTokenResult, Provenance, Result, TokenResult, derived, load, measured, summed
from lens_probes.settings import Layers
from lens_probes.summary import Summary, SummaryResult
from lens_probes.text import words
from lens_probes.text.prompts import Prompt, PromptTable, Table, Tokens
from lens_probes.two_models import Difference, difference
from lens_probes.weights import VectorReading, neuron_vectors, ov_vectors, read_vector

__version__ = _metadata.version("lens-probes")

__all__ = [
    "AttentionPair",
    "AttentionPairResult",
    "AttentionPatterns",
    "AttentionPatternsResult",
    "AttentionWindow",
    "AttentionWindowResult",
    "CrossAttention",
    "CrossAttentionResult",
    "Difference",
    "DirectLogitAttribution",
    "DirectLogitAttributionResult",
    "EmbeddingDensity",
    "EmbeddingDensityResult",
    "EncoderView",
    "Experiment",
    "FeatureVisualization",
    "FeatureVisualizationResult",
    "HeadAblation",
    "HeadAblationResult",
    "HeadTopicSimilarity",
    "HeadTopicSimilarityResult",
    "HeadValueRank",
    "HeadValueRankResult",
    "ImageReconstruction",
    "ImageReconstructionResult",
    "InputReconstruction",
    "InputReconstructionResult",
    "KeyValueOverlap",
    "KeyValueOverlapResult",
    "LayerSkip",
    "LayerSkipResult",
    "LayerTokenResult",
    "Layers",
    "LensComparison",
    "LensComparisonResult",
    "LogitLens",
    "LogitLensResult",
    "MassiveActivations",
    "MassiveActivationsResult",
    "MaxActivatingExamples",
    "MaxActivatingExamplesResult",
    "MaxActivatingTokens",
    "MaxActivatingTokensResult",
    "ModelView",
    "Page",
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
    "ResidualUpdate",
    "ResidualUpdateResult",
    "Result",
    "Run",
    "SourceAttribution",
    "SourceAttributionResult",
    "StateDimension",
    "StateDimensionResult",
    "Summary",
    "SummaryResult",
    "Table",
    "TextExperiment",
    "TiedKeyValue",
    "TiedKeyValueResult",
    "TokenResult",
    "Tokens",
    "TopicAblation",
    "TopicAblationResult",
    "TopicActivity",
    "TopicActivityResult",
    "TunedLens",
    "TunedLensResult",
    "UnitActivation",
    "UnitActivationResult",
    "VectorReading",
    "cluster",
    "delete_run",
    "demo",
    "derived",
    "difference",
    "figures",
    "greedy_targets",
    "inference",
    "jacobian_lens",
    "list_probes",
    "load",
    "load_model",
    "measured",
    "neuron_vectors",
    "open_run",
    "ov_vectors",
    "packed",
    "page",
    "read_vector",
    "run",
    "run_corpus",
    "stems",
    "summed",
    "tiny",
    "toy",
    "untrained",
    "words",
]


def __dir__() -> list[str]:
    return __all__
