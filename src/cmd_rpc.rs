//! `resilver rpc`: any method, as JSON.

use std::io::Read as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use clap::builder::PossibleValuesParser;
use resilver_rpc::methods::METHODS;
use resilver_rpc::{Client, ClientError};
use serde_json::Value;

use crate::{Session, output};

const EXAMPLES: &str = r#"Examples:
  resilver rpc rpc_get_methods
  resilver rpc bdev_malloc_create '{"name":"m0","num_blocks":131072,"block_size":512}'
  resilver rpc load_config - < target.json"#;

/// How often a target that is waited for is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Arguments of `rpc`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RpcArgs {
    /// The method.
    #[arg(value_parser = PossibleValuesParser::new(METHODS.iter().map(|it| it.name)), hide_possible_values = true)]
    method: String,
    /// Its parameters, a JSON object; `-` reads them from standard input.
    params: Option<String>,
    /// How long to wait for a target that is not there yet.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    wait: Option<Duration>,
}

pub(crate) fn run(session: &Session, args: &RpcArgs) -> anyhow::Result<()> {
    let text = match args.params.as_deref() {
        None => "{}".to_owned(),
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        }
        Some(text) => text.to_owned(),
    };
    let params: Value = serde_json::from_str(&text).context("the parameters are not JSON")?;
    let mut client = connect(session, args.wait)?;
    let answer = client.call(&args.method, params)?;
    output::warn(answer.warning.as_deref());
    output::json(&answer.result);
    Ok(())
}

/// Connects, trying again while the target may still be starting.
fn connect(session: &Session, wait: Option<Duration>) -> Result<Client, ClientError> {
    let begun = Instant::now();
    loop {
        match session.connect() {
            Err(ClientError::Connect { .. }) if wait.is_some_and(|wait| begun.elapsed() < wait) => {
                std::thread::sleep(LOOK_EVERY);
            }
            connected => return connected,
        }
    }
}
