"""How long queries take on the tables of a large image set.

The store is a real one, of units with made-up numbers: as many rows as ImageNet-1K and an SAE of 24,576 features give.
"""

import statistics
import time
from pathlib import Path

import duckdb

from saefw.bench.frame import Bench, at_most
from saefw.index import INDEX, quoted, types
from saefw.store import Store
from saefw.tally import tile
from saefw.unit import Unit

SIZE_MB = 1500
"""MB that the store of all of ImageNet-1K takes, about; with another --size it has as large a share of the images."""

IMAGES, FEATURES, CLASSES = 1_281_167, 24_576, 1000
TOP, IMAGE_FEATURES, SAES = 64, 32, 40

QUERIES = {
    "features of a class": """
        SELECT f.feature, f.share, f.ap FROM class_feature f JOIN class c ON c.unit = f.acts AND c.label = f.label
        WHERE f.sae = $sae AND c.name = $class ORDER BY f.share DESC LIMIT 20""",
    "images of a feature": """
        SELECT t.rank, e.key, t.token, t.value FROM top_example t
        JOIN example e ON e.unit = t.acts AND e.example = t.example
        WHERE t.sae = $sae AND t.feature = $feature ORDER BY t.rank""",
    "classes of a feature": """
        SELECT c.name, f.rate, f.share, f.ap FROM class_feature f JOIN class c ON c.unit = f.acts AND c.label = f.label
        WHERE f.sae = $sae AND f.feature = $feature ORDER BY f.ap DESC LIMIT 20""",
    "features of an image": """
        SELECT t.rank, t.feature, t.score, s.frequency FROM top_feature t
        JOIN example e ON e.unit = t.acts AND e.example = t.example
        JOIN feature s ON s.unit = t.unit AND s.feature = t.feature
        WHERE t.sae = $sae AND e.key = $key ORDER BY t.rank""",
    "the front": "FROM pareto ORDER BY l0",
}
"""As they stand in docs/queries.md, but for what is asked for."""


def bench(bench: Bench) -> None:
    """Build the store, and measure queries, each on a database opened for it."""
    share = min(1.0, (bench.size_mb or SIZE_MB) / SIZE_MB)
    # A copy of the index is made to be published; DuckDB needs room to sort.
    bench.room(int(6 * share * SIZE_MB * 10**6))
    store, n_images, n_features = Store(bench.folder), int(IMAGES * share), max(1, int(FEATURES * share))
    bench.told("writing tables", 0, 2)
    begun = time.perf_counter()
    kept = build(store, n_images, n_features)
    written = time.perf_counter() - begun
    bench.told("indexing", 1, 2)
    begun = time.perf_counter()
    store.index(kept)
    indexed = time.perf_counter() - begun
    bench.part(f"{n_images:,} images, {n_features:,} features, {CLASSES:,} classes, {SAES} SAEs")
    parquet = sum(path.stat().st_size for path in bench.folder.rglob("*.parquet"))
    bench.row("tables written", written, "s")
    bench.row("tables indexed", indexed, "s")
    bench.row("tables", parquet / 1e6, "MB")
    bench.row("index", (bench.folder / INDEX).stat().st_size / 1e6, "MB")
    visuals = next(folder for folder in kept.values() if folder.parent.name == "visuals")
    with store.db() as db:
        ((sae,),) = db.execute("SELECT DISTINCT sae FROM feature WHERE unit = ?", [visuals.name]).fetchall()
    for i, (name, query) in enumerate(QUERIES.items()):
        taken = []
        for turn in range(bench.rounds + 1):
            bench.told("queries", i * (bench.rounds + 1) + turn, len(QUERIES) * (bench.rounds + 1))
            # Others each time, so that nothing is asked twice.
            asked = {
                "sae": sae,
                "class": f"class {(7 + 131 * turn) % CLASSES}",
                "feature": (11 + 1327 * turn) % n_features,
                "key": _key((5 + 65_537 * turn) % n_images),
            }
            told = {name: value for name, value in asked.items() if f"${name}" in query}
            begun = time.perf_counter()
            with store.db() as db:
                rows = db.execute(query, told).fetchall()
            taken.append(time.perf_counter() - begun)
            if not rows:
                raise RuntimeError(f"'{name}' found nothing")
        bench.row(name, 1000 * statistics.median(taken[1:]), "ms", bound=at_most(200, "value"))


def _key(example: int) -> str:
    return f"n{example // 1300:08d}/{example:08d}.JPEG"


def build(store: Store, n_images: int, n_features: int) -> dict[str, Path]:
    """Write the units of a store, as the stages would; return their folders by address."""
    acts = Unit("record", {"of": "bench"}, label="images")
    saes = [Unit("train", {"of": "bench", "k": k}, (acts,), label=f"k {k}") for k in range(SAES)]
    visuals = Unit("visuals", {"of": "bench"}, (saes[0], acts), label="features")
    classes, features = tile(CLASSES, n_features)
    whose = f"'{saes[0].address}' AS sae, '{acts.address}' AS acts"
    tables: dict[Unit, dict[str, str]] = {
        acts: {
            "acts": f"SELECT 'b' AS backbone, 'd' AS dataset, 10 AS layer, {n_images} AS n_examples",
            "class": f"SELECT range AS label, 'class ' || range AS name FROM range({CLASSES})",
            "example": f"SELECT range AS example, format('n{{:08d}}/{{:08d}}.JPEG', range // 1300, range) AS key, "
            f"range // 1300 % {CLASSES} AS label, 'train' AS split FROM range({n_images})",
        },
        visuals: {
            "feature": f"SELECT {whose}, range AS feature, {_number(1)} AS frequency, 1 AS mean, 1 AS p50, 2 AS p90, "
            f"3 AS p99, 4 AS max FROM range({n_features})",
            "feature_histogram": "SELECT range // 64 AS feature, range % 64 AS low, low + 1 AS high, range AS n "
            f"FROM range({64 * n_features})",
            "top_example": f"SELECT {whose}, range // {TOP} AS feature, range % {TOP} AS rank, "
            f"range * 7919 % {n_images} AS example, range % 196 AS token, {_number(2)} AS value, {_number(2)} AS score "
            f"FROM range({TOP * n_features})",
            "top_feature": f"SELECT {whose}, range // {IMAGE_FEATURES} AS example, range % {IMAGE_FEATURES} AS rank, "
            f"range * 7919 % {n_features} AS feature, {_number(3)} AS score FROM range({IMAGE_FEATURES * n_images})",
            "class_feature": f"SELECT {whose}, range // {n_features} AS label, range % {n_features} AS feature, "
            f"{_number(4)} AS rate, {_number(5)} AS mean, {_number(6)} AS share, {_number(7)} AS ap, 0 AS purity "
            f"FROM range({CLASSES * n_features}) ORDER BY label // {classes}, feature // {features}, label, feature",
        },
    }
    for i, sae in enumerate(saes):
        numbers = ", ".join(f"('{name}', {i}, {i / 7})" for name in ("nmse", "l0", "dead"))
        tables[sae] = {
            "sae": f"SELECT '{acts.address}' AS acts, 'topk' AS variant, {n_features} AS n_features, '{{}}' AS config",
            "metric": f"SELECT name, step, value FROM (VALUES {numbers}) AS v(name, step, value)",
        }
    kept = {}
    with duckdb.connect() as db:
        for unit, of in tables.items():
            for table, query in of.items():
                path, columns = store.begin(unit) / f"{table}.parquet", db.sql(query).columns
                casts = ", ".join(f"CAST({name} AS {types()[table][name]}) AS {name}" for name in columns)
                db.execute(
                    f"COPY (SELECT '{unit.address}' AS unit, {casts} FROM ({query})) TO '{quoted(path)}' "
                    "(FORMAT parquet, COMPRESSION zstd)"
                )
            kept[unit.address] = store.keep(unit, 1.0, {})
    return kept


def _number(seed: int) -> str:
    """Return SQL for numbers from 0 to 1 that look like chance."""
    return f"CAST((range * 2654435761 + {seed} * 40503) % 16777216 AS REAL) / 16777216"
