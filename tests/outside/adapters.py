"""transformers' own tests of BERT and GPT-2, run on the decoupled classes; README.md says how and with what result.

The folder that has transformers' `tests` is on PYTHONPATH; nothing of it is in this repository.
"""

from tests.models.bert.test_modeling_bert import BertModelTest, BertModelTester
from tests.models.gpt2.test_modeling_gpt2 import GPT2ModelTest, GPT2ModelTester
from tests.test_configuration_common import ConfigTester
from transformers.models.auto import modeling_auto

from detransformer import models
from detransformer.models.auto import CLASSES
from detransformer.models.configuration import config_fields

DECOUPLING = dict(num_original_layers=1, num_divisions=4)  # D O: two layers, the last one original

for config, table in CLASSES.items():  # as models of the library have them; the tests look heads up by these names
    for _, original, decoupled in table:
        for name, names in vars(modeling_auto).items():
            if name.endswith("_MAPPING_NAMES") and names.get(original.config_class.model_type) == original.__name__:
                names[config.model_type] = decoupled.__name__


class DecoupledBertModelTester(BertModelTester):
    """BERT's test model, decoupled."""

    def get_config(self):
        return models.DecoupledBertConfig(**config_fields(super().get_config()), **DECOUPLING)


class DecoupledBertModelTest(BertModelTest):
    """All tests of an encoder; a decoupled BERT is refused as a decoder, so it has no `generate`."""

    all_model_classes = tuple(decoupled for _, _, decoupled in CLASSES[models.DecoupledBertConfig])
    all_generative_model_classes = ()
    test_generation_tester_mixin_inheritance = None  # asks that a class without `generate` has none of its tests
    pipeline_model_mapping = {
        "feature-extraction": models.DecoupledBertModel,
        "fill-mask": models.DecoupledBertForMaskedLM,
        "text-classification": models.DecoupledBertForSequenceClassification,
        "token-classification": models.DecoupledBertForTokenClassification,
        "zero-shot": models.DecoupledBertForSequenceClassification,
    }

    def setUp(self):
        self.model_tester = DecoupledBertModelTester(self)
        self.config_tester = ConfigTester(self, config_class=models.DecoupledBertConfig, hidden_size=32)


class DecoupledGPT2ModelTester(GPT2ModelTester):
    """GPT-2's test model, decoupled."""

    base_model_class = models.DecoupledGPT2Model
    config_class = models.DecoupledGPT2Config
    causal_lm_class = models.DecoupledGPT2LMHeadModel
    question_answering_class = models.DecoupledGPT2ForQuestionAnswering
    sequence_classification_class = models.DecoupledGPT2ForSequenceClassification
    token_classification_class = models.DecoupledGPT2ForTokenClassification
    num_original_layers, num_divisions = DECOUPLING.values()
    forced_config_args = [*GPT2ModelTester.forced_config_args, *DECOUPLING]


class DecoupledGPT2ModelTest(GPT2ModelTest):
    """All tests but those of the class with two heads."""

    model_tester_class = DecoupledGPT2ModelTester
    all_model_classes = tuple(decoupled for _, _, decoupled in CLASSES[models.DecoupledGPT2Config])
    pipeline_model_mapping = {
        "feature-extraction": models.DecoupledGPT2Model,
        "text-classification": models.DecoupledGPT2ForSequenceClassification,
        "text-generation": models.DecoupledGPT2LMHeadModel,
        "token-classification": models.DecoupledGPT2ForTokenClassification,
        "zero-shot": models.DecoupledGPT2ForSequenceClassification,
    }
    test_gpt2_double_lm_head_model = None


del BertModelTest, GPT2ModelTest
