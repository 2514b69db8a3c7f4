//! Mirrors: bringing a disk over to another one while its guest goes on.

use std::path::PathBuf;

use resilver_bdev::JobVerb;
use resilver_bdev::job::OnError;
use resilver_bdev::mirror::{
    BitmapMode, GRANULARITY_DEFAULT, MirrorConfig, ObserverPolicy, SyncMode,
};
use resilver_reactor::Nanos;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::bdev_file::BdevUringCreate;
use super::job::CopyModeName;
use super::{Answer, Caller, Rpc};
use crate::error::RpcError;
use crate::mirror::{MirrorStart, NewFile, TargetLeg};
use crate::target::Target;

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum SyncName {
    /// Everything.
    #[default]
    Full,
    /// Only what is allocated in the top image.
    Top,
    /// Only what is written from now on.
    None,
    /// What a bitmap says.
    Incremental,
    /// What a bitmap says.
    Bitmap,
}

impl SyncName {
    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Top => "top",
            Self::None => "none",
            Self::Incremental => "incremental",
            Self::Bitmap => "bitmap",
        }
    }
}

/// What becomes of a working bitmap (QEMU `BitmapSyncMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum BitmapModeName {
    /// It is what the target lacks, however the mirror ends.
    Always,
    /// It goes on recording, untouched.
    Never,
    /// It is what the target lacks if the mirror ends well, else untouched.
    OnSuccess,
}

impl From<BitmapModeName> for BitmapMode {
    fn from(name: BitmapModeName) -> Self {
        match name {
            BitmapModeName::Always => Self::Always,
            BitmapModeName::Never => Self::Never,
            BitmapModeName::OnSuccess => Self::OnSuccess,
        }
    }
}

/// Who waits for a target that only observes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum ObserverName {
    /// Nobody; what it missed is forgotten.
    Drop,
    /// Nobody; what it missed is copied later.
    Track,
    /// The guest.
    Block,
}

impl From<ObserverName> for ObserverPolicy {
    fn from(name: ObserverName) -> Self {
        match name {
            ObserverName::Drop => Self::Drop,
            ObserverName::Track => Self::Track,
            ObserverName::Block => Self::Block,
        }
    }
}

/// What is done about an error (QEMU `BlockdevOnError`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum OnErrorName {
    /// The job fails; the guest runs on from the source.
    Report,
    /// The range is tried again, ever more slowly.
    Ignore,
    /// The job pauses until it is resumed.
    Stop,
    /// The job pauses if room ran out, else it fails.
    Enospc,
}

impl From<OnErrorName> for OnError {
    fn from(name: OnErrorName) -> Self {
        match name {
            OnErrorName::Report => Self::Report,
            OnErrorName::Ignore => Self::Ignore,
            OnErrorName::Stop => Self::Stop,
            OnErrorName::Enospc => Self::Enospc,
        }
    }
}

fn report() -> OnErrorName {
    OnErrorName::Report
}

fn enospc() -> OnErrorName {
    OnErrorName::Enospc
}

fn yes() -> bool {
    true
}

/// Whether the target's file is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum TargetMode {
    /// It is, and is overwritten.
    #[default]
    Existing,
    /// It is made, with the source's size; what is there already is left alone and the call refused.
    Create,
}

/// What a guest's reset does to a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum OnGuestReset {
    /// Nothing.
    #[default]
    Keep,
    /// It is cancelled, as Cloud Hypervisor does it.
    Cancel,
}

/// Starts to mirror a disk to another one. The guest, if there is one, goes on; when the job is `ready` both are equal, and
/// `job_complete` switches over. The target is either a bdev (`target`) or a file (`target_path`).
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevMirrorStart {
    /// The bdev to be mirrored.
    source: String,
    /// The bdev to mirror to; nobody else may use it.
    #[serde(default)]
    target: Option<String>,
    /// The file to mirror to.
    #[serde(default)]
    target_path: Option<PathBuf>,
    /// Whether the file exists: `existing`, or `create` to make it.
    #[serde(default)]
    target_mode: TargetMode,
    /// Format of the file; only `raw`.
    #[serde(default)]
    target_format: Option<String>,
    /// Name of the bdev made for the file; `<job_id>-target` if not given.
    #[serde(default)]
    target_name: Option<String>,
    /// Name of the job; the source's name if not given.
    #[serde(default)]
    job_id: Option<String>,
    /// Name of the mirror itself among the bdevs; `mirror-<job_id>` if not given.
    #[serde(default)]
    name: Option<String>,
    /// What is copied besides the guest's writes: `full`, everything; `none`, nothing; `top`, what the image on top has, which is
    /// everything where there is no base, as in this version; `bitmap` or `incremental`, what a bitmap says.
    #[serde(default)]
    sync: SyncName,
    /// How guest writes reach the target meanwhile.
    #[serde(default)]
    copy_mode: CopyModeName,
    /// A dirty bitmap of the source that says what is copied, with sync `full` or `bitmap`; its granularity is the mirror's.
    #[serde(default)]
    bitmap: Option<String>,
    /// What becomes of the bitmap. `always`: it is what the target lacks, however the mirror ends. `never`: it goes on recording,
    /// untouched. `on-success`: as `always` if the mirror ends well, else as `never`. `always` if not given.
    #[serde(default)]
    bitmap_mode: Option<BitmapModeName>,
    /// Bytes of a chunk that is copied or not: a power of two from 512 to 64 MiB; 65536 if not given.
    #[serde(default)]
    granularity: Option<u32>,
    /// Bytes that may be in flight to the target at once; 0 for 16 MiB.
    #[serde(default)]
    buf_size: u64,
    /// Bytes a second that are copied at most; 0 for no limit. Guest writes are not limited.
    #[serde(default)]
    speed: u64,
    /// What is done about errors of the source. The guest sees those of its own requests in any case.
    #[serde(default = "report")]
    on_source_error: OnErrorName,
    /// What is done about errors of the target. The guest never sees them.
    #[serde(default = "enospc")]
    on_target_error: OnErrorName,
    /// Target I/O that takes longer counts as failed, milliseconds; it is waited for without limit if not given.
    #[serde(default)]
    target_timeout_ms: Option<u64>,
    /// With sync `none` and write-blocking: who waits for a target that lags. `block`: the guest. `track`: nobody, and what it
    /// missed is copied later. `drop`: nobody, and what it missed is counted and forgotten. `block` if not given.
    #[serde(default)]
    observer_policy: Option<ObserverName>,
    /// What a guest's reset does to the mirror.
    #[serde(default)]
    on_guest_reset: OnGuestReset,
    /// The copier holds back so that the 99th percentile of the guest's latency stays below so many microseconds, as far as that is its
    /// doing; it goes on with 1 MiB a second at least.
    #[serde(default)]
    latency_ceiling_us: Option<u64>,
    /// A background copy that has not got on for some seconds may change to write-blocking by itself.
    #[serde(default)]
    auto_converge: bool,
    /// Compare source and target whole before a switch-over. What differs is copied again; if it differs then, the
    /// switch-over is undone with the reason.
    #[serde(default)]
    verify_before_complete: bool,
    /// Whether zeroes may be unallocated on the target.
    #[serde(default = "yes")]
    unmap: bool,
    /// While no guest is at work, leave copies to the file system or its server where both legs are files there: it makes the files
    /// share extents, which takes no time. They share a fault of their device then, too, and what is written later costs an
    /// extent of its own.
    #[serde(default)]
    copy_offload: bool,
    /// The target is known to read zero everywhere, so zeroes need not be written. Wrong, it leaves the target wrong.
    #[serde(default)]
    target_is_zero: bool,
    /// Switch as soon as `job_complete` finds the legs equal; otherwise wait in `pending` for `job_finalize`.
    #[serde(default = "yes")]
    auto_finalize: bool,
    /// Forget the job when it has ended; otherwise it stays `concluded` until `job_dismiss`.
    #[serde(default = "yes")]
    auto_dismiss: bool,
    /// Not in this version.
    #[serde(default)]
    keep_source: Option<Value>,
}

/// How the target was named.
enum GivenTarget {
    /// A bdev.
    Bdev(String),
    /// A file, for which a bdev is made.
    File(PathBuf),
}

impl BdevMirrorStart {
    /// Refuses what this version cannot do.
    fn refuse_what_is_not_there_yet(&self) -> Result<(), RpcError> {
        if let Some(value) = &self.keep_source {
            return Err(RpcError::not_yet("keep_source", value.clone(), "leave it out"));
        }
        if self.latency_ceiling_us == Some(0) {
            let expected = "at least 1 microsecond; leave it out for no ceiling";
            return Err(RpcError::parameter("latency_ceiling_us", 0, expected));
        }
        if self.target_timeout_ms == Some(0) {
            let expected = "at least 1 millisecond; leave it out to wait without limit";
            return Err(RpcError::parameter("target_timeout_ms", 0, expected));
        }
        match self.target_format.as_deref() {
            None | Some("raw") => Ok(()),
            Some(format) => Err(RpcError::not_yet("target_format", format, "only 'raw' is")),
        }
    }

    /// The bitmap to work by, and what becomes of it.
    fn working_bitmap(&self) -> Result<Option<(String, BitmapMode)>, RpcError> {
        let sync = self.sync.name();
        let mode = self.bitmap_mode.map(BitmapMode::from);
        let Some(bitmap) = &self.bitmap else {
            let expected = match (self.sync, mode) {
                (SyncName::Incremental | SyncName::Bitmap, _) => {
                    format!("must provide a valid bitmap name for '{sync}' sync mode")
                }
                (_, Some(_)) => "Cannot specify bitmap sync mode without a bitmap".to_owned(),
                (_, None) => return Ok(None),
            };
            return Err(RpcError::parameter("bitmap", Value::Null, expected));
        };
        if matches!(self.sync, SyncName::None | SyncName::Top) {
            let expected = format!("Sync mode '{sync}' not supported with bitmap.");
            return Err(RpcError::parameter("sync", sync, expected));
        }
        if let Some(granularity) = self.granularity {
            let expected = "Granularity and bitmap cannot both be set";
            return Err(RpcError::parameter("granularity", granularity, expected));
        }
        let mode = match (self.sync, mode) {
            (SyncName::Incremental, None | Some(BitmapMode::OnSuccess)) => BitmapMode::OnSuccess,
            (SyncName::Incremental, Some(other)) => {
                let expected =
                    "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'";
                return Err(RpcError::parameter("bitmap_mode", other.name(), expected));
            }
            (_, mode) => mode.unwrap_or(BitmapMode::Always),
        };
        Ok(Some((bitmap.clone(), mode)))
    }

    /// The target, which is named in one of two ways.
    fn given_target(&self) -> Result<GivenTarget, RpcError> {
        match (&self.target, &self.target_path) {
            (Some(name), None) => Ok(GivenTarget::Bdev(name.clone())),
            (None, Some(path)) => Ok(GivenTarget::File(path.clone())),
            (None, None) => {
                let expected = "give either 'target', the name of a bdev, or 'target_path', a file";
                Err(RpcError::missing("target", expected))
            }
            (Some(_), Some(path)) => {
                let expected = "give either 'target', the name of a bdev, or 'target_path', a file, and not both";
                Err(RpcError::parameter("target_path", path.to_string_lossy(), expected))
            }
        }
    }

    fn start(&self) -> MirrorStart {
        let job_id = self.job_id.clone().unwrap_or_else(|| self.source.clone());
        MirrorStart {
            source: self.source.clone(),
            mirror: self.name.clone().unwrap_or_else(|| format!("mirror-{job_id}")),
            config: MirrorConfig {
                job_id,
                copy_mode: self.copy_mode.into(),
                granularity: self.granularity.unwrap_or(GRANULARITY_DEFAULT),
                buf_size: self.buf_size,
                speed: self.speed,
                on_source_error: self.on_source_error.into(),
                on_target_error: self.on_target_error.into(),
                target_timeout: self.target_timeout_ms.map(Nanos::from_millis),
                unmap: self.unmap,
                target_is_zero: self.target_is_zero,
                auto_finalize: self.auto_finalize,
                cancel_on_guest_reset: self.on_guest_reset == OnGuestReset::Cancel,
                verify_before_complete: self.verify_before_complete,
                latency_ceiling: self.latency_ceiling_us.map(Nanos::from_micros),
                auto_converge: self.auto_converge,
                sync: match self.sync {
                    SyncName::None => SyncMode::None,
                    // No bdev has a base yet, so that the top image is all there is.
                    _ => SyncMode::Full,
                },
                observer: self.observer_policy.map_or(ObserverPolicy::Block, Into::into),
                bitmap: None,
                diff_cluster: None,
            },
            auto_dismiss: self.auto_dismiss,
            copy_offload: self.copy_offload,
            bitmap: None,
        }
    }
}

impl Rpc for BdevMirrorStart {
    const NAME: &'static str = "bdev_mirror_start";
    const EXAMPLE: &'static str = r#"{"source":"disk0","target_path":"/mnt/new/disk0.raw","target_mode":"create","job_id":"move0"}"#;
    const RESULT: &'static str = "an object: job_id";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        self.refuse_what_is_not_there_yet()?;
        let target: &std::rc::Rc<Target> = &caller.target;
        let given = self.given_target()?;
        let bitmap = self.working_bitmap()?;
        let mut start = self.start();
        start.bitmap = bitmap;
        let (names, source) = target.engage_mirror(&start).await?;
        let job_id = start.config.job_id.clone();
        match given {
            GivenTarget::Bdev(leg) => {
                let told = |error: RpcError| error.told_as(&["target"], "target", leg.as_str());
                let leg = TargetLeg::Given(leg.clone());
                target.start_mirror(start, names, leg).await.map_err(told)?;
            }
            GivenTarget::File(path) => {
                let told = |error: RpcError| {
                    error.told_as(&["target", "filename"], "target_path", path.to_string_lossy())
                };
                let name = self.target_name.unwrap_or_else(|| format!("{job_id}-target"));
                let engaged = target
                    .engage_new_bdev(&name)
                    .map_err(|error| error.told_as(&["name"], "target_name", name.as_str()))?;
                // Not whether it was superseded: it is overwritten, and moving back to the old disk is a common thing.
                target.check_file_is_free(&path, false)?;
                let geometry = source.geometry();
                let file = match self.target_mode {
                    TargetMode::Create => {
                        // A new file lacks everything, whatever a bitmap says of another.
                        if start.bitmap.is_some() {
                            let expected =
                                "'existing': a bitmap is about a target that has a copy already";
                            return Err(RpcError::parameter("target_mode", "create", expected));
                        }
                        start.config.target_is_zero = start.config.sync == SyncMode::Full;
                        Some(NewFile::create(&path, geometry.size()).await?)
                    }
                    TargetMode::Existing => None,
                };
                let create = BdevUringCreate {
                    name,
                    filename: path.clone(),
                    block_size: Some(geometry.block_size),
                    readonly: false,
                    direct: true,
                    engine: None,
                    uuid: None,
                };
                let made = create.open(&caller, engaged).await.map_err(told)?;
                target.start_mirror(start, names, TargetLeg::Made(made)).await.map_err(told)?;
                if let Some(file) = file {
                    file.keep();
                }
            }
        }
        Ok(Answer::new(json!({ "job_id": job_id })))
    }
}

/// Ends a mirror that is ready with a good copy: the target is left as it is at one moment, the disk stays on its source
/// (QEMU's soft cancel).
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BdevMirrorFinish {
    /// The job.
    job_id: String,
}

impl Rpc for BdevMirrorFinish {
    const NAME: &'static str = "bdev_mirror_finish";
    const EXAMPLE: &'static str = r#"{"job_id":"disk0"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        caller.target.job_verb(&self.job_id, JobVerb::Finish).await?;
        Ok(Answer::done())
    }
}
