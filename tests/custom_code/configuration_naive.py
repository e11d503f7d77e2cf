"""Configuration class of the test suite's own custom-code repository."""

from transformers import PretrainedConfig


class NaiveNomicConfig(PretrainedConfig):
    """Holds whatever config.json says, under the model type that transformers 5 has taken."""

    model_type = "nomic_bert"

    def __init__(self, **values):
        super().__init__(**values)
