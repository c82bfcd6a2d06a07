"""S3Store against a real server."""
from __future__ import annotations
from lfm_scan.storage import S3Store, StorageConfig
from tests.servers import S3Server

def test_smoke(s3_server: S3Server, s3_bucket: str) -> None:
    store = S3Store(StorageConfig(endpoint_url=s3_server.endpoint_url))
    assert store.create(f"s3://{s3_bucket}/a", b"x").created
    assert store.get(f"s3://{s3_bucket}/a").data == b"x"
    for k in ["a//b", "/lead", " sp ace ", "per%20cent", "pl+us", "ha#sh", "qu?est", "ünï", "new\nline", "./dot", "../x", "a/../b", "tail/", "emoji😀", "tab\t", "q&amp;<x>\"'", "\x01ctl", "a\r\nb"]:
        try:
            print(repr(k), store.create(f"s3://{s3_bucket}/{k}", b"x" + k.encode()))
            print(store.get(f"s3://{s3_bucket}/{k}").data)
        except Exception as e:
            print("FAIL", repr(k), repr(e)[:300])
    print([o.uri for o in store.list(f"s3://{s3_bucket}/")])
