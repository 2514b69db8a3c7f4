//! Verification: comparing the legs of a mirror while both are in use.

use resilver_bdev::VerifyRequest;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::verify::VerifyStart;

fn all() -> u8 {
    100
}

fn yes() -> bool {
    true
}

/// Starts to compare source and target of a mirror that runs, beside the guest. What differs though it should be equal is
/// reported (event `verify_mismatch`) and copied again. What is still to be copied is left out and counted as skipped. The
/// job, of type `verify`, rests while its mirror is paused or switches over, and ends by itself or with its mirror.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevVerifyStart {
    /// The mirror's source.
    source: String,
    /// The mirror's target.
    target: String,
    /// Name of the job; `verify-` and the mirror's job if not given.
    #[serde(default)]
    job_id: Option<String>,
    /// How many of a hundred chunks are compared, spread over the disk: 1 to 100.
    #[serde(default = "all")]
    sample_percent: u8,
    /// Which chunks make the sample; another seed is another sample. A new one each time if not given.
    #[serde(default)]
    seed: Option<u64>,
    /// Bytes of the disk that are compared in a second at most; 0 for no limit.
    #[serde(default)]
    speed: u64,
    /// Forget the job when it has ended, but for the history; otherwise it stays `concluded` until `job_dismiss`.
    #[serde(default = "yes")]
    auto_dismiss: bool,
}

impl Rpc for BdevVerifyStart {
    const NAME: &'static str = "bdev_verify_start";
    const EXAMPLE: &'static str =
        r#"{"source":"disk0","target":"disk0-target","sample_percent":10}"#;
    const RESULT: &'static str = "an object: job_id";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        if !(1..=100).contains(&self.sample_percent) {
            let expected = "a percentage from 1 to 100";
            return Err(RpcError::parameter("sample_percent", self.sample_percent, expected));
        }
        let seed = self.seed.unwrap_or_else(|| crate::events::unix_seconds().to_bits());
        let job_id = caller
            .target
            .start_verify(VerifyStart {
                source: self.source,
                target: self.target,
                job_id: self.job_id,
                request: VerifyRequest {
                    sample_percent: self.sample_percent,
                    speed: self.speed,
                    seed,
                },
                auto_dismiss: self.auto_dismiss,
            })
            .await?;
        Ok(Answer::new(json!({ "job_id": job_id })))
    }
}
