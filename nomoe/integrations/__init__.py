"""nomoe inside other libraries; each module needs the library it is named after.

The core never imports these. What most people need of them is on `nomoe` itself.
"""

from __future__ import annotations


def check_encoder(encoder: object) -> None:
    """Refuse what is no encoder, such as a model's name.

    Raises:
        TypeError: It cannot encode.
    """
    if not callable(getattr(encoder, "encode_document", None)):
        raise TypeError(
            f"encoder is {type(encoder).__name__}, expected a nomoe.Encoder, as "
            "nomoe.Encoder.from_pretrained() gives"
        )
