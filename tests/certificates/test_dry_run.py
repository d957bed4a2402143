"""E14 at a recording boundary: a dry run of a rotation reads, and asks kubeadm for its version."""

from datetime import timedelta
from pathlib import Path

import pytest

from remediator.config import Mode
from tests.certificates.conftest import MakePki
from tests.certificates.test_rotate import NODE, rotate
from tests.engine.boundary import BOUNDARY, once, said_and_not_done

pytestmark = [pytest.mark.root, pytest.mark.debian, pytest.mark.cluster]


async def test_e14_a_dry_run_of_rotate_certificates_crosses_no_boundary(
    make_pki: MakePki, tmp_path: Path
) -> None:
    pki = make_pki(timedelta(days=3))
    found = await once(rotate(pki), NODE, tmp_path / "dry", mode=Mode.DRY_RUN)
    said_and_not_done(found, asking=" version --output short")
    done = await once(rotate(pki), NODE, tmp_path / "wet", mode=Mode.ENFORCE)
    assert done.reason == "Renewed", done.message
    crossed = BOUNDARY.crossed
    assert any(" renew all" in one for one in crossed if one.startswith("run "))
    assert any(one.startswith("open ") and "/backups/" in one for one in crossed)
