"""The dates of the files that `coordinator init` made, as heartbeats tell them."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest

from coordinator.certificate_dates import CertificateDates, enrolments_dates, own_certificate
from coordinator.identities import make_identities
from tests.coordinator.fleet import settings_for

DAY = 86_400.0


def test_every_file_that_the_enrolment_program_sees_is_told_of(tmp_path: Path):
    settings, now = settings_for(tmp_path), datetime.now(timezone.utc)
    dates = enrolments_dates(settings)
    assert dates() == {"certificates": {}, "revocation_lists": {}}, "before init"
    make_identities(settings, now)
    found = dates()
    assert set(found["certificates"]) == {"broker", "fleet-authority", "claims-authority", "enrolment", "doctor"}
    assert found["certificates"]["broker"] == pytest.approx(now.timestamp() + 365 * DAY, abs=2 * DAY)
    assert set(found["revocation_lists"]) == {"fleet", "claims"}
    (gateway,) = CertificateDates(own_certificate(settings, "gateway"), {})()["certificates"].values()
    assert gateway == pytest.approx(now.timestamp() + 365 * DAY, abs=2 * DAY)


def test_a_file_that_changed_is_read_again_and_a_damaged_one_is_left_out(tmp_path: Path):
    settings, now = settings_for(tmp_path), datetime.now(timezone.utc)
    make_identities(settings, now)
    dates = enrolments_dates(settings)
    before = dates()
    authority = (settings.broker_directory / "fleet-authority.pem").read_bytes()
    (settings.broker_directory / "broker.pem").write_bytes(authority)
    (settings.broker_directory / "fleet-revoked.pem").write_text("half a fi")
    found = dates()
    assert found["certificates"]["broker"] == before["certificates"]["fleet-authority"]
    assert set(found["revocation_lists"]) == {"claims"}
