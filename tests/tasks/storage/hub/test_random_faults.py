"""Random sequences of faults: never a wrong or partial snapshot, never a byte more than necessary."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_huggingface.tasks.hub_errors import HubError
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from support.hub_models import check_snapshot, hub_model, model_files

SIZE = 300_000
FILES = model_files(SIZE)
PLACES = st.integers(min_value=0, max_value=SIZE - 1)
FAULTS = st.one_of(
    st.builds(lambda after: ("cut", "cdn", {"after": after}), PLACES),
    st.builds(lambda after: ("truncate", "cdn", {"after": after}), PLACES),
    st.builds(lambda after: ("corrupt", "cdn", {"after": after}), PLACES),
    st.builds(lambda status: ("status", "cdn", {"status": status}), st.sampled_from([403, 408, 416, 429, 500, 503])),
    st.builds(lambda status: ("status", "resolve", {"status": status}), st.sampled_from([408, 429, 500, 502, 503])),
    st.builds(lambda status: ("status", "api", {"status": status}), st.sampled_from([408, 429, 503])),
    st.just(("ignore_range", "cdn", {})),
    st.just(("cut", "resolve", {"after": 3})),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=6))
def test_any_sequence_of_faults_ends_with_the_right_files_or_a_typed_error(hub, faults):
    hub.clear()
    hub.create("org/model", FILES)
    for kind, place, options in faults:
        hub.fault(kind, place, **options)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        try:
            check_snapshot(fetch_snapshot(hub_model(hub, store)).path, FILES)
        except HubError:
            assert not list(store.rglob("manifests/*.json"))
            assert not [p for p in store.rglob("snapshots/*/*") if p.name != ".lease"]
        for fault in hub.journal.faults:
            fault.times = 0
        check_snapshot(fetch_snapshot(hub_model(hub, store)).path, FILES)
    # Only what was corrupt, or could not be appended, is ever sent again.
    lost = [f for f in faults if f[0] in ("corrupt", "ignore_range") or f[2].get("status") == 416]
    assert hub.journal.sent("model.safetensors", "cdn") <= SIZE * (1 + len(lost))
