"""Which type has room for the values of two, unchanged; and which types Parquet has at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# bits of whole numbers that a float holds exactly, by its own
_EXACT_BITS = {16: 11, 32: 24, 64: 53}
_LARGEST_PRECISION = 38


def wider(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """Return a type that holds every value of both as it is; None if there is none."""
    import pyarrow as pa

    kinds = pa.types
    if one == other or kinds.is_null(other):
        return one
    if kinds.is_null(one):
        return other
    if kinds.is_dictionary(one):
        return wider(one.value_type, other)
    if kinds.is_dictionary(other):
        return wider(one, other.value_type)
    both = (one, other)
    if all(kinds.is_integer(kind) or kinds.is_floating(kind) for kind in both):
        return _wider_number(one, other)
    for family, wide in (
        ((kinds.is_string, kinds.is_large_string, kinds.is_string_view), pa.large_string()),
        ((kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view), pa.large_binary()),
    ):
        if all(any(is_kind(kind) for is_kind in family) for kind in both):
            return wide
    if all(kinds.is_decimal(kind) for kind in both):
        scale = max(kind.scale for kind in both)
        precision = max(kind.precision - kind.scale for kind in both) + scale
        return pa.decimal128(precision, scale) if precision <= _LARGEST_PRECISION else None
    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
    if all(any(is_list(kind) for is_list in lists) for kind in both):
        inner = wider(one.value_type, other.value_type)
        if inner is None:
            return None
        if all(kinds.is_fixed_size_list(kind) and kind.list_size == one.list_size for kind in both):
            return pa.list_(inner, one.list_size)
        is_large = any(kinds.is_large_list(kind) for kind in both)
        return pa.large_list(inner) if is_large else pa.list_(inner)
    if all(kinds.is_struct(kind) for kind in both):
        return _wider_struct(one, other)
    return None


def _wider_number(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    import pyarrow as pa

    kinds = pa.types
    wide, narrow = (one, other) if one.bit_width >= other.bit_width else (other, one)
    if kinds.is_floating(one) and kinds.is_floating(other):
        return wide
    if kinds.is_floating(one) or kinds.is_floating(other):
        real, whole = (one, other) if kinds.is_floating(one) else (other, one)
        widths = [width for width, bits in _EXACT_BITS.items() if whole.bit_width <= bits]
        if not widths:
            return None
        width = max(real.bit_width, min(widths))
        return {16: pa.float16(), 32: pa.float32(), 64: pa.float64()}[width]
    if kinds.is_signed_integer(wide) == kinds.is_signed_integer(narrow):
        return wide
    signed, unsigned = (one, other) if kinds.is_signed_integer(one) else (other, one)
    room = max(signed.bit_width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(room)


def _wider_struct(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    import pyarrow as pa

    fields: dict[str, Any] = {field.name: field.type for field in one}
    for field in other:
        kind = wider(fields.get(field.name, pa.null()), field.type)
        if kind is None:
            return None
        fields[field.name] = kind
    return pa.struct(list(fields.items()))


def with_floats(kind: pa.DataType) -> pa.DataType:
    """Replace int64, wherever it is in a type, by float64."""
    import pyarrow as pa

    return _replaced(kind, pa.types.is_int64, lambda _: pa.float64())


def without_nulls(kind: pa.DataType) -> pa.DataType:
    """Replace "null", wherever it is in a type, by text: readers of Parquet stumble over it."""
    import pyarrow as pa

    return _replaced(kind, pa.types.is_null, lambda _: pa.string())


def with_room(kind: pa.DataType) -> pa.DataType:
    """Let dictionaries, wherever they are in a type, hold as many values as all files together."""
    import pyarrow as pa

    return _replaced(
        kind,
        lambda one: pa.types.is_dictionary(one) and one.index_type.bit_width < 32,
        lambda one: pa.dictionary(pa.int32(), one.value_type, one.ordered),
    )


def _replaced(
    kind: pa.DataType,
    is_old: Callable[[pa.DataType], bool],
    new: Callable[[pa.DataType], pa.DataType],
) -> pa.DataType:
    import pyarrow as pa

    kinds = pa.types
    if is_old(kind):
        return new(kind)
    if kinds.is_struct(kind):
        return pa.struct([field.with_type(_replaced(field.type, is_old, new)) for field in kind])
    if kinds.is_map(kind):
        return pa.map_(
            _replaced(kind.key_type, is_old, new),
            kind.item_field.with_type(_replaced(kind.item_type, is_old, new)),
        )
    for is_list, make in ((kinds.is_list, pa.list_), (kinds.is_large_list, pa.large_list)):
        if is_list(kind):
            return make(kind.value_field.with_type(_replaced(kind.value_type, is_old, new)))
    if kinds.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_replaced(kind.value_type, is_old, new))
        return pa.list_(inner, kind.list_size)
    return kind


def check_parquet(schema: pa.Schema) -> None:
    """Refuse columns that no Parquet file can hold.

    Raises:
        ValueError: One has such a type.
    """
    import pyarrow as pa
    from pyarrow import parquet

    for field in schema:
        alone = pa.schema([field])
        try:
            with parquet.ParquetWriter(pa.BufferOutputStream(), alone) as writer:
                writer.write_table(alone.empty_table())
        except pa.ArrowException as error:
            raise ValueError(
                f"column {field.name!r} holds {field.type}, which Parquet cannot hold; leave it "
                f"out with columns= (--columns): {error}"
            ) from error
