//! What bdevs there are, and what they have done.

use resilver_bdev::stats::{BUCKETS, Histogram, KindStats, bucket_bound};
use resilver_bdev::{IoKind, IoStats};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::events::unix_seconds;

/// Lists bdevs, and the mirrors that stand above some of them. A mirror's entry lasts as long as its job.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevGetBdevs {
    /// Name of one bdev; all if not given.
    #[serde(default)]
    name: Option<String>,
    /// How long to wait for the named bdev to appear, milliseconds.
    #[serde(default)]
    timeout: Option<u64>,
}

/// How often a bdev that is waited for is looked for, milliseconds.
const LOOK_AGAIN_MS: u64 = 20;

impl Rpc for BdevGetBdevs {
    const NAME: &'static str = "bdev_get_bdevs";
    const EXAMPLE: &'static str = r#"{"name":"Malloc0"}"#;
    const RESULT: &'static str = "an array of SPDK's objects: name, product_name, uuid, block_size, num_blocks, claimed, driver_specific and more";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let Some(name) = &self.name else {
            let graph = caller.target.graph();
            let mut entries: Vec<_> = graph.bdevs.values().collect();
            entries.sort_by_key(|entry| entry.order);
            let bdevs = entries.into_iter().map(|entry| graph.bdev_json(entry));
            return Ok(Answer::new(bdevs.chain(graph.mirrors_json()).collect::<Vec<_>>()));
        };
        let mut left_ms = self.timeout.unwrap_or(0);
        loop {
            let found = {
                let graph = caller.target.graph();
                let mirror = graph.mirrors_json().find(|mirror| mirror["name"] == **name);
                mirror.map_or_else(|| graph.bdev(name).map(|entry| graph.bdev_json(entry)), Ok)
            };
            match found {
                Ok(bdev) => return Ok(Answer::new(vec![bdev])),
                Err(error) if left_ms == 0 => return Err(error),
                Err(_) => {}
            }
            let pause_ms = left_ms.min(LOOK_AGAIN_MS);
            tokio::time::sleep(std::time::Duration::from_millis(pause_ms)).await;
            left_ms -= pause_ms;
        }
    }
}

/// Counters of bdevs since they were made. A tick is a nanosecond. Latencies are kept in buckets, so the least and the
/// greatest are the bounds of theirs.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevGetIostat {
    /// Name of one bdev; all if not given.
    #[serde(default)]
    name: Option<String>,
    /// Names of bdevs, as newer clients of SPDK send them.
    #[serde(default)]
    names: Option<Vec<String>>,
    /// Only `false` is supported: a disk has one channel.
    #[serde(default)]
    per_channel: Option<bool>,
    /// Only `none` is supported: whoever wants a difference takes two readings.
    #[serde(default)]
    reset_mode: Option<String>,
}

impl Rpc for BdevGetIostat {
    const NAME: &'static str = "bdev_get_iostat";
    const EXAMPLE: &'static str = r#"{"name":"Malloc0"}"#;
    const RESULT: &'static str =
        "SPDK's object: tick_rate, ticks, bdevs with bytes_read, num_read_ops and so on";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        if self.per_channel == Some(true) {
            return Err(RpcError::parameter("per_channel", true, "false"));
        }
        if let Some(mode) = self.reset_mode.filter(|mode| mode != "none") {
            return Err(RpcError::parameter("reset_mode", mode, "'none'"));
        }
        let mut names = self.names.unwrap_or_default();
        names.extend(self.name);
        let graph = caller.target.graph();
        if names.is_empty() {
            names.extend(graph.bdevs.keys().cloned());
        }
        let stats = |name: &String| -> Result<Value, RpcError> {
            Ok(iostat(name, graph.bdev(name)?.bdev.stats()))
        };
        let bdevs = names.iter().map(stats).collect::<Result<Vec<_>, _>>()?;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // nanoseconds since 1970 fit
        let ticks = (unix_seconds() * 1e9) as u64;
        Ok(Answer::new(json!({ "tick_rate": 1_000_000_000_u64, "ticks": ticks, "bdevs": bdevs })))
    }
}

/// What SPDK calls each kind: in bytes, in operations and in latencies. Ours has two kinds more and no copy.
const KINDS: [(IoKind, &str, &str); 5] = [
    (IoKind::Read, "bytes_read", "read"),
    (IoKind::Write, "bytes_written", "write"),
    (IoKind::Unmap, "bytes_unmapped", "unmap"),
    (IoKind::Flush, "bytes_flushed", "flush"),
    (IoKind::WriteZeroes, "bytes_zeroed", "write_zeroes"),
];

fn iostat(name: &str, stats: &IoStats) -> Value {
    let mut json = Map::new();
    json.insert("name".into(), name.into());
    let mut errors = Map::new();
    for (kind, bytes, word) in KINDS {
        let stats: &KindStats = stats.of(kind);
        let (least, greatest) = extremes(&stats.latency);
        json.insert(bytes.into(), stats.bytes.get().into());
        json.insert(format!("num_{word}_ops"), stats.ops.get().into());
        json.insert(format!("{word}_latency_ticks"), stats.latency.sum().0.into());
        json.insert(format!("max_{word}_latency_ticks"), greatest.into());
        json.insert(format!("min_{word}_latency_ticks"), least.into());
        if stats.errors.get() > 0 {
            errors.insert(word.into(), stats.errors.get().into());
        }
    }
    for field in [
        "bytes_copied",
        "num_copy_ops",
        "copy_latency_ticks",
        "max_copy_latency_ticks",
        "min_copy_latency_ticks",
    ] {
        json.insert(field.into(), 0.into());
    }
    json.insert("io_error".into(), errors.into());
    Value::Object(json)
}

/// The bounds of the lowest and the highest bucket that counted anything.
fn extremes(histogram: &Histogram) -> (u64, u64) {
    let counts = histogram.counts();
    let least = counts.iter().position(|count| *count > 0);
    let greatest = counts.iter().rposition(|count| *count > 0);
    // The last bucket has no upper bound; the lower one is what is known.
    let bound = |index: usize| bucket_bound(index.min(BUCKETS - 2)).0;
    (
        least.map_or(0, |index| if index == 0 { 0 } else { bound(index - 1) }),
        greatest.map_or(0, bound),
    )
}
