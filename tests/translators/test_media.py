import pytest

from kvcensus.backends.model import CacheTier
from kvcensus.translators.media import SPELLINGS, Media


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        (None, CacheTier.HBM),
        ("GPU", CacheTier.HBM),
        ("cpu", CacheTier.CPU_DRAM),
        ("CPU", CacheTier.CPU_DRAM),
        ("CPU_PINNED", CacheTier.CPU_DRAM),
        ("DISK", CacheTier.LOCAL_SSD),
        ("EXTERNAL", CacheTier.OBJECT_STORE),
        ("FS", CacheTier.LOCAL_SSD),
        ("OBJ", CacheTier.OBJECT_STORE),
        ("STORAGE", CacheTier.OBJECT_STORE),
        ("Remote_GPU", CacheTier.REMOTE_HBM),
    ],
)
def test_what_engines_say(medium: str | None, tier: CacheTier) -> None:
    assert Media().tier_of(medium) is tier


@pytest.mark.parametrize("tier", list(CacheTier))
def test_the_name_of_a_tier_is_a_spelling_of_it(tier: CacheTier) -> None:
    assert Media().tier_of(tier.value) is tier


def test_no_spelling_means_two_tiers() -> None:
    words = [word for words in SPELLINGS.values() for word in words.split()]
    assert len(words) == len(set(words))


@pytest.mark.parametrize("medium", ["", "CXL", "gpu ", "tape"])
def test_an_unknown_spelling_is_no_tier(medium: str) -> None:
    assert Media().tier_of(medium) is None


def test_a_source_may_add_spellings_and_override_them() -> None:
    media = Media({"CXL": CacheTier.CPU_DRAM, "storage": CacheTier.LOCAL_SSD})
    assert media.tier_of("cxl") is CacheTier.CPU_DRAM
    assert media.tier_of("STORAGE") is CacheTier.LOCAL_SSD
    assert media.tier_of("gpu") is CacheTier.HBM
