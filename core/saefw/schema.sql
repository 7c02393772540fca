-- The tables of saefw.duckdb. made_at is in UTC. `unit` is who made a row; `acts`, `sae` and `probe` are addresses to join on.
CREATE TABLE unit (unit TEXT PRIMARY KEY, stage TEXT, label TEXT, content JSON, made_with JSON, made_at TIMESTAMP, seconds DOUBLE);
CREATE TABLE need (unit TEXT, needs TEXT, PRIMARY KEY (unit, needs));
CREATE TABLE metric (unit TEXT, name TEXT, step BIGINT, value DOUBLE);

-- Recording. layer counts blocks from 0; tokens: all, cls, patches, or how many patches of an image; prefix: the tokens
-- before the patches, in order, as `cls` or `cls, register, register`; mean_norm: mean L2 norm of a train patch;
-- offset_ratio: ||mean|| / ||standard deviations|| of these patches; both of [CLS] where that alone is recorded. A live
-- recording has no shards.
CREATE TABLE acts (unit TEXT PRIMARY KEY, backbone TEXT, dataset TEXT, layer SMALLINT, tokens TEXT, d_model INTEGER,
    grid_h SMALLINT, grid_w SMALLINT, n_examples INTEGER, n_tokens SMALLINT, prefix TEXT, dtype TEXT, mean_norm REAL,
    offset_ratio DOUBLE);
CREATE TABLE shard (unit TEXT, shard INTEGER, file TEXT, first_example INTEGER, n_examples INTEGER, bytes BIGINT, sha256 TEXT);
-- split: train, valid, test, or `broken` of an image that could not be read: it keeps its place and counts nowhere.
CREATE TABLE example (unit TEXT, example INTEGER, key TEXT, label SMALLINT, split TEXT);
CREATE TABLE broken (unit TEXT, example INTEGER, key TEXT, why TEXT);
CREATE TABLE class (unit TEXT, label SMALLINT, name TEXT);

-- Features. Where [CLS] is looked at, there is one token an image: read "image" for "patch". frequency: share of patches
-- on which it fires; mean, p50, p90, p99, max: of its positive values, in SAE units; the quantiles within 1/128 of
-- themselves. monosemanticity: how alike the images are on which it fires, -1..1; NULL if not asked for, or not known.
CREATE TABLE sae (unit TEXT PRIMARY KEY, acts TEXT, variant TEXT, n_features INTEGER, config JSON);
CREATE TABLE feature (unit TEXT, sae TEXT, acts TEXT, feature INTEGER, frequency REAL, mean REAL, p50 REAL, p90 REAL, p99 REAL,
    max REAL, monosemanticity REAL);
-- How many of its positive values are from low to below high: 8 equal steps from each power of two to the next.
CREATE TABLE feature_histogram (unit TEXT, feature INTEGER, low REAL, high REAL, n BIGINT);
-- The score of an image with a feature is its largest value over the patches, their sum or its value on [CLS], as
-- rank_by of the stage says. The images of largest score of a feature, one row an image; value, token: its largest value
-- and the patch where that is (0: the first patch; NULL: [CLS]); value is 0 if it fires on no patch.
CREATE TABLE top_example (unit TEXT, sae TEXT, acts TEXT, feature INTEGER, rank SMALLINT, example INTEGER, token SMALLINT,
    value REAL, score REAL);
-- The features of largest score of an image.
CREATE TABLE top_feature (unit TEXT, sae TEXT, acts TEXT, example INTEGER, rank SMALLINT, feature INTEGER, score REAL);
-- Of each class and feature, over the labelled images of the split: rate of images it fires on, mean score, share of all
-- its mass (the sum over patches) that lies in the class, average precision of the score as a detector of the class,
-- purity: share of the feature's top images that are of the class.
CREATE TABLE class_feature (unit TEXT, sae TEXT, acts TEXT, label SMALLINT, feature INTEGER, rate REAL, mean REAL, share REAL,
    ap REAL, purity REAL);
-- The features that have a contact sheet, in the folder of the unit; visuals: whose tables it was drawn from.
CREATE TABLE sheet (unit TEXT, visuals TEXT, feature INTEGER, file TEXT);

-- Probes and steering. prediction: of test images; margin: top logit minus the second; confidence: the largest
-- probability. calibration: of the test images whose confidence is above low and at most high, how many, their mean
-- confidence and their accuracy; bins without images have no row. An edit: place is patches or cls,
-- role says whose features (own class, other class, by hand), target is that class, chosen_by is how they were chosen
-- (effect, mass, ap, single, hand) or of which control it is (like features, random directions), way is how those were
-- chosen that the control stands beside (of an edit: chosen_by); norm: L2 norm of the whole change; before, after: the
-- target's probability; others: mean change of all other classes' logits; spread: mean size of that change.
-- dose of an edit, amount of each of its features: in units of its p99 with mode set or add, a factor with mode scale,
-- a share with mode ablate.
CREATE TABLE probe (unit TEXT PRIMARY KEY, acts TEXT, variant TEXT, config JSON);
CREATE TABLE prediction (unit TEXT, acts TEXT, example INTEGER, predicted SMALLINT, margin REAL, confidence DOUBLE);
CREATE TABLE calibration (unit TEXT, bin SMALLINT, low DOUBLE, high DOUBLE, n INTEGER, confidence DOUBLE, accuracy DOUBLE);
-- Whether probes still read what an SAE writes back. Of labelled images of a split, with the tokens of the place as they
-- are (clean), replaced by the SAE's reconstruction, and by their mean over the train split (ablated); measure: accuracy,
-- cross_entropy (nats); recovered: (reconstructed - ablated) / (clean - ablated), with its 95 % bootstrap interval; NaN
-- where clean and ablated do not differ.
CREATE TABLE faithfulness (unit TEXT, sae TEXT, probe TEXT, acts TEXT, place TEXT, split TEXT, measure TEXT, n INTEGER,
    clean DOUBLE, reconstructed DOUBLE, ablated DOUBLE, recovered DOUBLE, low DOUBLE, high DOUBLE);
CREATE TABLE edit (unit TEXT, sae TEXT, probe TEXT, acts TEXT, edit INTEGER, example INTEGER, place TEXT, role TEXT,
    way TEXT, chosen_by TEXT, mode TEXT, dose REAL, target SMALLINT, norm REAL, before REAL, after REAL, others REAL,
    spread REAL);
CREATE TABLE edit_feature (unit TEXT, edit INTEGER, feature INTEGER, amount REAL);
CREATE TABLE edit_logit (unit TEXT, edit INTEGER, label SMALLINT, before REAL, after REAL);
-- The features of each class, the first ones of each way of choosing; predicted: the change of the class's logit at 1 p99.
CREATE TABLE choice (unit TEXT, way TEXT, label SMALLINT, rank SMALLINT, feature INTEGER, score DOUBLE, predicted DOUBLE);
-- What edits did on average, with 95 % bootstrap intervals over n images; measure: logit, probability, flip (of images not
-- taken for the target before), others, spread; target NULL: all; against: less that control on the same image, or NULL.
CREATE TABLE outcome (unit TEXT, role TEXT, way TEXT, chosen_by TEXT, against TEXT, dose REAL, target SMALLINT, measure TEXT,
    n INTEGER, mean DOUBLE, low DOUBLE, high DOUBLE);
-- Edits that people saved on the page under a name. directly: past the blocks, into the [CLS] that the probe reads; patches:
-- those that were edited, as numbers with a space between, NULL: all; norm: of what was added to the tokens; amount: in
-- units of the feature's p99, a factor with mode scale, a share with mode ablate; before, after: probabilities.
CREATE TABLE saved_edit (unit TEXT PRIMARY KEY, name TEXT, sae TEXT, probe TEXT, acts TEXT, example INTEGER, place TEXT,
    directly BOOLEAN, patches TEXT, norm DOUBLE);
CREATE TABLE saved_feature (unit TEXT, feature INTEGER, mode TEXT, amount DOUBLE);
CREATE TABLE saved_class (unit TEXT, label SMALLINT, before DOUBLE, after DOUBLE);

-- Notes: what people call a feature and say of it; of each feature the newest.
CREATE TABLE note (sae TEXT, feature INTEGER, name TEXT, text TEXT, made_at TIMESTAMP, PRIMARY KEY (sae, feature));

CREATE VIEW final AS SELECT unit, name, arg_max(value, step) AS value FROM metric GROUP BY ALL;
CREATE VIEW pareto AS SELECT s.unit AS sae, s.variant, a.layer, m.nmse, m.l0, m.dead, u.label FROM sae s JOIN unit u USING (unit) JOIN acts a ON a.unit = s.acts
    JOIN (PIVOT final ON name IN ('nmse', 'l0', 'dead') USING first(value) GROUP BY unit) m ON m.unit = s.unit;
CREATE VIEW best_probe AS SELECT DISTINCT ON (p.acts) p.acts, a.backbone, a.dataset, a.layer, p.unit AS probe, f.value
    FROM probe p JOIN acts a ON a.unit = p.acts JOIN final f ON f.unit = p.unit AND f.name = 'valid_accuracy'
    LEFT JOIN final l ON l.unit = p.unit AND l.name = 'valid_loss'
    ORDER BY a.backbone, a.dataset, a.layer, p.acts, f.value DESC, l.value, p.unit;
CREATE VIEW feature_class AS SELECT t.unit, t.sae, t.acts, t.feature, c.name AS class, count(*) AS n, avg(t.value) AS mean_value
    FROM top_example t JOIN example e ON e.unit = t.acts AND e.example = t.example
    JOIN class c ON c.unit = t.acts AND c.label = e.label GROUP BY ALL;
-- Of the test images of a class, how many a probe takes for another, and for its own.
CREATE VIEW confusion AS SELECT p.unit, p.acts, e.label, p.predicted, count(*) AS n
    FROM prediction p JOIN example e ON e.unit = p.acts AND e.example = p.example GROUP BY ALL;
CREATE VIEW class_accuracy AS SELECT f.unit, f.acts, f.label, c.name AS class, sum(f.n)::INTEGER AS n,
    coalesce(sum(f.n) FILTER (f.predicted = f.label), 0) / sum(f.n) AS accuracy
    FROM confusion f JOIN class c ON c.unit = f.acts AND c.label = f.label GROUP BY ALL;
