//! The `resilver` binary: the target, and everything that talks to one.
//!
//! `serve` is the target. Every other command is a client of one over JSON-RPC, or runs by itself. The families `bdev`,
//! `vhost`, `job` and `state` are made from the table of methods: one verb for each method, so that a new method is on the
//! command line without a line here. What is written by hand is what a person wants otherwise than the RPC gives it:
//! tables, and mirrors that are waited for.

mod bench;
mod cmd_method;
mod cmd_mirror;
mod cmd_rpc;
mod cmd_serve;
mod content;
mod cut;
mod demo;
mod interrupt;
mod load;
mod output;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use resilver_rpc::{Client, ClientError};

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 refused or failed, with the reason on standard error; 2 wrong usage; 3 no target can be reached; \
4 a wait timed out; 130 a wait was interrupted.";

/// Serves virtual disks to virtual machines over vhost-user-blk, mirrors them live and switches them over.
#[derive(Debug, Parser)]
#[command(name = "resilver", version, after_help = EXIT_CODES, subcommand_required = true)]
struct Cli {
    /// The target's RPC socket.
    #[arg(long, global = true, value_name = "PATH", env = "RESILVER_RPC_SOCKET", default_value_os_t = default_socket())]
    rpc_socket: PathBuf,
    /// Print results as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a target.
    Serve(cmd_serve::ServeArgs),
    /// Mirror disks while their guests run, and switch over.
    Mirror(cmd_mirror::MirrorArgs),
    /// Call any method of a target.
    Rpc(cmd_rpc::RpcArgs),
    /// Serve a scratch disk, mirror it under load, switch over and check every byte.
    Demo(demo::DemoArgs),
    /// Measure the latency and the throughput of vhost-user-blk back ends, and compare them.
    Bench(Box<bench::BenchArgs>),
    /// Print shell completions.
    #[command(after_help = "Example: resilver completions bash > /etc/bash_completion.d/resilver")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write one for every command into a directory.
    #[command(after_help = "Example: resilver man > resilver.1")]
    Man {
        /// The directory.
        dir: Option<PathBuf>,
    },
}

/// The directory of sockets of whoever runs this: a user has one of their own, root the system's.
fn runtime_dir() -> PathBuf {
    let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let user = rustix::process::getuid();
    match own {
        Some(dir) => PathBuf::from(dir).join("resilver"),
        None if user.is_root() => PathBuf::from("/run/resilver"),
        None => std::env::temp_dir().join(format!("resilver-{}", user.as_raw())),
    }
}

fn default_socket() -> PathBuf {
    runtime_dir().join("rpc.sock")
}

/// What every client command is given.
struct Session {
    rpc_socket: PathBuf,
    json: bool,
}

impl Session {
    fn connect(&self) -> Result<Client, ClientError> {
        Client::connect(&self.rpc_socket)
    }
}

/// The whole command line.
fn command() -> clap::Command {
    Cli::command().subcommands(cmd_method::FAMILIES.iter().map(cmd_method::command))
}

fn main() -> ExitCode {
    let matches = command().get_matches();
    match run(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error);
            ExitCode::from(exit_code(&error))
        }
    }
}

/// A wait that ran out of time.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct TimedOut(String);

/// A wait that was interrupted.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Interrupted(String);

/// What a shell knows an interrupted command by: 128 and SIGINT.
const INTERRUPTED: u8 = 130;

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<Interrupted>() {
        return INTERRUPTED;
    }
    if error.is::<TimedOut>() {
        return 4;
    }
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Connect { .. }) => 3,
        Some(
            ClientError::Io(_) | ClientError::Frame(_) | ClientError::Json(_) | ClientError::Rpc(_),
        )
        | None => 1,
    }
}

fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    if let Some((name, family)) = matches.subcommand()
        && let Some(found) = cmd_method::FAMILIES.iter().find(|it| it.name == name)
    {
        // Global arguments of a command that clap's derive does not know of are read by hand.
        let session = Session {
            rpc_socket: matches
                .get_one::<PathBuf>("rpc_socket")
                .cloned()
                .unwrap_or_else(default_socket),
            json: matches.get_flag("json"),
        };
        return cmd_method::run(&session, found, family);
    }
    let cli = Cli::from_arg_matches(matches)?;
    let session = Session { rpc_socket: cli.rpc_socket, json: cli.json };
    match cli.command {
        Command::Serve(args) => cmd_serve::run(&session, &args),
        Command::Mirror(args) => cmd_mirror::run(&session, &args),
        Command::Rpc(args) => cmd_rpc::run(&session, &args),
        Command::Demo(args) => demo::run(&args, session.json),
        Command::Bench(args) => bench::run(&session, &args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command(), "resilver", &mut script);
            output::say(String::from_utf8_lossy(&script).trim_end());
            Ok(())
        }
        Command::Man { dir: Some(dir) } => Ok(clap_mangen::generate_to(command(), dir)?),
        Command::Man { dir: None } => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command()).render(&mut page)?;
            output::say(String::from_utf8_lossy(&page).trim_end());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_holds_together() {
        super::command().debug_assert();
    }
}
