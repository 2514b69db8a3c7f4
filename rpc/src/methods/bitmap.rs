//! Named dirty bitmaps, and changes of several of them at once.

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, Caller, Method, Rpc, parse};
use crate::bitmaps::{BitmapAction, BitmapName, Failed};
use crate::error::{RpcError, code};

/// A method that is one action on bitmaps, alone or in a transaction.
trait Action: Rpc {
    fn action(self) -> BitmapAction;
}

async fn alone(action: impl Action, caller: Caller) -> Result<Answer, RpcError> {
    let actions = [action.action()];
    caller.target.change_bitmaps(&actions).await.map_err(|failed| failed.error)?;
    Ok(Answer::done())
}

/// Adds a dirty bitmap to a bdev: it remembers which chunks are written from now on (QEMU `block-dirty-bitmap-add`).
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BitmapAdd {
    /// The bdev.
    name: String,
    /// Name of the bitmap, 1 to 1023 bytes, unique on the bdev.
    bitmap: String,
    /// Bytes of a chunk: a power of two of at least 512; 65536 if not given.
    #[serde(default)]
    granularity: Option<u32>,
    /// Keep it in the state directory when the target stops. After a crash it is inconsistent and can only be removed.
    #[serde(default)]
    persistent: bool,
    /// Record nothing until it is enabled.
    #[serde(default)]
    disabled: bool,
}

impl Action for BitmapAdd {
    fn action(self) -> BitmapAction {
        let Self { name: bdev, bitmap, granularity, persistent, disabled } = self;
        BitmapAction::Add { name: BitmapName { bdev, bitmap }, granularity, persistent, disabled }
    }
}

impl Rpc for BitmapAdd {
    const NAME: &'static str = "bdev_dirty_bitmap_add";
    const EXAMPLE: &'static str = r#"{"name":"disk0","bitmap":"since-monday"}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        alone(self, caller).await
    }
}

/// The methods whose parameters are a bdev and a bitmap.
macro_rules! simple {
    ($(#[$doc:meta])* $method:ident, $name:literal, $action:expr) => {
        $(#[$doc])*
        #[derive(Debug, Deserialize, JsonSchema)]
        pub(super) struct $method {
            /// The bdev.
            name: String,
            /// The bitmap.
            bitmap: String,
        }

        impl Action for $method {
            fn action(self) -> BitmapAction {
                let make: fn(BitmapName) -> BitmapAction = $action;
                make(BitmapName { bdev: self.name, bitmap: self.bitmap })
            }
        }

        impl Rpc for $method {
            const NAME: &'static str = $name;
            const EXAMPLE: &'static str = r#"{"name":"disk0","bitmap":"since-monday"}"#;
            const RESULT: &'static str = "true";

            async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
                alone(self, caller).await
            }
        }
    };
}

simple!(
    /// Removes a dirty bitmap, from the state directory too. One that a job uses stays.
    BitmapRemove, "bdev_dirty_bitmap_remove", BitmapAction::Remove
);
simple!(
    /// Forgets what a dirty bitmap has recorded so far.
    BitmapClear, "bdev_dirty_bitmap_clear", BitmapAction::Clear
);
simple!(
    /// Lets a dirty bitmap record from now on.
    BitmapEnable, "bdev_dirty_bitmap_enable", |name| BitmapAction::Record(name, true)
);
simple!(
    /// Lets a dirty bitmap record nothing from now on: what is written meanwhile it will never know.
    BitmapDisable, "bdev_dirty_bitmap_disable", |name| BitmapAction::Record(name, false)
);

/// A bitmap to merge from: of the same bdev, by its name, or of another one.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum From {
    /// A bitmap of the same bdev.
    Own(String),
    /// A bitmap of another bdev of the same size.
    Other {
        /// The bdev.
        name: String,
        /// The bitmap.
        bitmap: String,
    },
}

/// Makes dirty in one bitmap what is dirty in others, whatever their granularities. The others stay as they are.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BitmapMerge {
    /// The bdev.
    name: String,
    /// The bitmap that is merged into.
    bitmap: String,
    /// The bitmaps that are merged: names, or objects with `name` (of another bdev of the same size) and `bitmap`.
    bitmaps: Vec<From>,
}

impl Action for BitmapMerge {
    fn action(self) -> BitmapAction {
        let Self { name: bdev, bitmap, bitmaps } = self;
        let from = |it| match it {
            From::Own(bitmap) => BitmapName { bdev: bdev.clone(), bitmap },
            From::Other { name: bdev, bitmap } => BitmapName { bdev, bitmap },
        };
        let from = bitmaps.into_iter().map(from).collect();
        BitmapAction::Merge { into: BitmapName { bdev, bitmap }, from }
    }
}

impl Rpc for BitmapMerge {
    const NAME: &'static str = "bdev_dirty_bitmap_merge";
    const EXAMPLE: &'static str = r#"{"name":"disk0","bitmap":"all","bitmaps":["monday",{"name":"disk1","bitmap":"monday"}]}"#;
    const RESULT: &'static str = "true";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        alone(self, caller).await
    }
}

/// Lists the dirty bitmaps of a bdev.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct BitmapGet {
    /// The bdev.
    name: String,
    /// One bitmap; all if not given.
    #[serde(default)]
    bitmap: Option<String>,
}

impl Rpc for BitmapGet {
    const NAME: &'static str = "bdev_dirty_bitmap_get";
    const EXAMPLE: &'static str = r#"{"name":"disk0"}"#;
    const RESULT: &'static str = "an array of objects: name, recording, persistent, busy (and the job_id), granularity, count (dirty bytes), \
         inconsistent where it is";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let graph = caller.target.graph();
        graph.bdev(&self.name)?;
        let mut list = graph.bitmaps_json(&self.name);
        if let Some(bitmap) = &self.bitmap {
            list.retain(|it| it["name"] == bitmap.as_str());
            if list.is_empty() {
                let message = format!("Dirty bitmap '{bitmap}' not found on bdev '{}'", self.name);
                let facts = json!({ "bdev": self.name, "bitmap": bitmap });
                return Err(RpcError::new(code::NOT_FOUND, "bitmap_not_found", message, facts));
            }
        }
        Ok(Answer::new(list))
    }
}

/// One action of a transaction.
#[derive(Debug, Deserialize, JsonSchema)]
struct TransactionAction {
    /// The method.
    method: String,
    /// Its parameters.
    params: Value,
}

/// Carries out several methods at one moment, all or none: every disk that they are about is held meanwhile. The methods that can be
/// part of one are `bdev_dirty_bitmap_add`, `_remove`, `_clear`, `_enable`, `_disable` and `_merge`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Transaction {
    /// The actions, carried out in this order.
    actions: Vec<TransactionAction>,
}

/// An action as its method reads it.
fn action_of(name: &str, params: Value) -> Result<BitmapAction, RpcError> {
    fn read<A: Action>(method: &Method, params: Value) -> Result<BitmapAction, RpcError> {
        parse::<A>(method.schema(), params).map(A::action)
    }
    let expected = "a bdev_dirty_bitmap_ method that changes something";
    let Some(method) = Method::find(name) else {
        return Err(RpcError::parameter("method", name, expected));
    };
    match method.name {
        BitmapAdd::NAME => read::<BitmapAdd>(method, params),
        BitmapRemove::NAME => read::<BitmapRemove>(method, params),
        BitmapClear::NAME => read::<BitmapClear>(method, params),
        BitmapEnable::NAME => read::<BitmapEnable>(method, params),
        BitmapDisable::NAME => read::<BitmapDisable>(method, params),
        BitmapMerge::NAME => read::<BitmapMerge>(method, params),
        other => Err(RpcError::not_yet("method", other, expected)),
    }
}

impl Rpc for Transaction {
    const NAME: &'static str = "transaction";
    const EXAMPLE: &'static str = r#"{"actions":[{"method":"bdev_dirty_bitmap_clear","params":{"name":"disk0","bitmap":"a"}},{"method":"bdev_dirty_bitmap_disable","params":{"name":"disk1","bitmap":"a"}}]}"#;
    const RESULT: &'static str = "an array: the result of each action";

    async fn call(self, caller: Caller) -> Result<Answer, RpcError> {
        let mut actions = Vec::with_capacity(self.actions.len());
        for (index, TransactionAction { method, params }) in self.actions.into_iter().enumerate() {
            let action = action_of(&method, params);
            actions.push(action.map_err(Failed::at(index)).map_err(not_done)?);
        }
        caller.target.change_bitmaps(&actions).await.map_err(not_done)?;
        Ok(Answer::new(vec![Value::from(true); actions.len()]))
    }
}

/// The error, and of which action it is.
fn not_done(failed: Failed) -> RpcError {
    let Failed { index, mut error } = failed;
    let place = index.map(|index| format!("action {index} of ")).unwrap_or_default();
    error.message = format!("{place}the transaction: {}; nothing was done", error.message);
    if let (Some(index), Some(Value::Object(data))) = (index, &mut error.data) {
        data.insert("action".to_owned(), index.into());
    }
    error
}
