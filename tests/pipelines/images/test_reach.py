"""A data set reads its own files, whatever its card and its rows name."""

from __future__ import annotations

import http.server
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from givens.image_files import rows_of, write_parquet, write_pictures

from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.images.reach import leads_out, values_below


@pytest.fixture
def private(tmp_path):
    """Images that are somebody's."""
    write_parquet(tmp_path / "private" / "train.parquet", rows_of(20))
    write_pictures(tmp_path / "private" / "pictures", 1, 12, 12)
    return tmp_path / "private"


def load(source, streaming):
    return load_images(DataConfig(source=str(source), image_size=12, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_card_that_leads_elsewhere_is_refused(tmp_path, private, streaming):
    folder = tmp_path / "mine"
    write_parquet(folder / "train.parquet", rows_of(20))
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)

        do_GET = do_HEAD

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    places = [f"{private}/train.parquet", "../private/*.parquet", f"http://127.0.0.1:{server.server_port}/a.parquet"]
    configs = [f"configs:\n- config_name: default\n  data_files: {place}" for place in places]
    configs += [f"a: &a {places[0]}\nconfigs:\n- {{config_name: default, data_files: *a}}"]
    for config in configs:
        (folder / "README.md").write_text(f"---\n{config}\n---\n")
        with pytest.raises(UserError, match=r"README\.md: configs: .* leads out of the folder"):
            load(folder, streaming)
    server.shutdown()
    server.server_close()
    assert not asked
    (folder / "README.md").write_text('---\nconfigs:\n- config_name: default\n  data_files: "*.parquet"\n---\n')
    assert len(load(folder, streaming).train) == 18


def test_rows_that_name_other_files_are_bad_images(tmp_path, private):
    (tmp_path / "mine").mkdir()
    write_pictures(tmp_path / "mine" / "pictures", 12, 12, 12)
    for place, good in ((tmp_path / "mine/pictures", True), (private / "pictures", False)):
        rows = [{"bytes": None, "path": str(place / f"{k if good else 0}.png")} for k in range(12)]
        pq.write_table(pa.table({"image": pa.array(rows)}), tmp_path / "mine" / "train.parquet")
        if good:
            assert len(load(tmp_path / "mine", False).train) == 11
        else:
            with pytest.raises(UserError, match="names a file that is not the data set's own"):
                load(tmp_path / "mine", False)


def test_what_leads_out():
    inside = ["*.parquet", "data/train-*.parquet", "**", "default", "a..b", "..."]
    outside = ["/etc/passwd", "~/a", "../a", "a/../../b", "a\\..\\b", "hf://datasets/a/b/c", "http://a"]
    assert not any(map(leads_out, inside)) and all(map(leads_out, outside))
    assert values_below("a: [/x]\nconfigs: [{b: c}, d]\ne: /f", "configs") == ["b", "c", "d"]
    assert values_below("a: {configs: /x}", "configs") == [] == values_below("configs: [", "configs")
