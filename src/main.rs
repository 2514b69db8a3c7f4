//! The resilver binary: being built.

mod content;
mod cut;
mod demo;
mod load;

use clap::Parser as _;

#[derive(clap::Parser)]
enum Command {
    /// Serve a scratch disk, mirror it under load, switch over and check every byte.
    Demo(demo::DemoArgs),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Demo(args) => demo::run(&args),
    }
}
