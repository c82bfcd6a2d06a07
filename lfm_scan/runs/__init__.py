"""A run and its state in the run directory: plan, parts, results. Nothing here knows of Ray.

RUN_DIR/config.json          what was asked, and the fingerprint; written first
RUN_DIR/plan/                which input belongs to which shard; plan/index.json comes last
RUN_DIR/parts/part-*.parquet one a shard, put once, never changed: it exists = the shard is done
RUN_DIR/results/*.parquet    the parts merged into files a query engine likes
RUN_DIR/_SUCCESS.json        the summary and a list of every part and file; written last
"""
