//! `resilver serve`: the target.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use resilver_reactor::Idle;
use resilver_rpc::reactors::CpuMask;
use resilver_rpc::serve::{Ready, ServeConfig, UringMode};
use tracing_subscriber::EnvFilter;

use crate::{Session, output, runtime_dir};

const EXAMPLES: &str = "\
Examples:
  resilver serve
  resilver serve --cores 0 --idle spin --state-dir ./state --metrics 127.0.0.1:9464

Log records go to standard error; RESILVER_LOG chooses them (debug, resilver_rpc=trace; info if unset).";

/// What reactors do when idle.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum IdleArg {
    /// Poll for ever: the lowest latency, a whole core each.
    Spin,
    /// Poll for a while, then sleep until something happens.
    Adaptive,
}

/// Who submits io_uring requests to the kernel.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum UringModeArg {
    /// sqpoll if a core is named for it, else enter.
    Auto,
    /// A kernel thread that polls: no system calls.
    Sqpoll,
    /// The reactor, at most one system call a turn.
    Enter,
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ServeArgs {
    /// Directory of the controllers' sockets.
    #[arg(long, value_name = "DIR", default_value_os_t = runtime_dir())]
    vhost_dir: PathBuf,
    /// Cores to pin one reactor each to, such as 2-3,5. Without it there is one reactor, which is not pinned.
    #[arg(long, value_name = "LIST", value_parser = CpuMask::parse_list)]
    cores: Option<CpuMask>,
    /// What reactors do when idle.
    #[arg(long, value_enum, default_value = "adaptive")]
    idle: IdleArg,
    /// Who submits io_uring requests to the kernel.
    #[arg(long, value_enum, default_value = "auto")]
    uring_mode: UringModeArg,
    /// Core of the kernel's submission thread; give it one that no reactor spins on.
    #[arg(long, value_name = "N")]
    sqpoll_core: Option<u32>,
    /// Serve metrics for Prometheus at http://ADDR:PORT/metrics.
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// Directory that remembers which disks were superseded by a switch-over. Name one wherever disks are moved.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Calls to carry out first, as save_config writes them.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(crate) fn run(session: &Session, args: &ServeArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("RESILVER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let config = ServeConfig {
        rpc_socket: session.rpc_socket.clone(),
        vhost_dir: args.vhost_dir.clone(),
        cores: args.cores,
        idle: match args.idle {
            IdleArg::Spin => Idle::Spin,
            IdleArg::Adaptive => Idle::Adaptive,
        },
        uring_mode: match args.uring_mode {
            UringModeArg::Auto => UringMode::Auto,
            UringModeArg::Sqpoll => UringMode::Sqpoll,
            UringModeArg::Enter => UringMode::Enter,
        },
        sqpoll_core: args.sqpoll_core,
        metrics: args.metrics,
        state_dir: args.state_dir.clone(),
        config: args.config.clone(),
    };
    let socket = session.rpc_socket.display().to_string();
    resilver_rpc::serve::run(config, std::future::pending(), |ready| announce(&socket, ready))?;
    Ok(())
}

/// Prints the one line that says that calls are taken.
fn announce(socket: &str, ready: &Ready) {
    let mut line = format!("resilver is ready on {socket}");
    if let Some(address) = ready.metrics {
        line.push_str(&format!(", metrics on http://{address}/metrics"));
    }
    if let Err(error) = &ready.config {
        line.push_str(&format!("; {error}"));
    }
    output::say(&line);
}
