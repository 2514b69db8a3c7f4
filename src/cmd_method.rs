//! The families of commands that are made from the table of methods: `resilver bdev uring-create NAME FILENAME` calls
//! `bdev_uring_create`.
//!
//! Required parameters are positional, in the order in which the method declares them; all others are options. The list of
//! each family has a table beside its JSON.

use clap::{Arg, ArgAction, ArgMatches, Command};
use resilver_rpc::methods::{METHODS, Method};
use serde_json::{Map, Value};

use crate::Session;
use crate::output::{self, Column, bytes, text};

/// A family: the methods whose names begin with its name.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    /// What the names of its methods begin with.
    prefix: &'static str,
    about: &'static str,
    /// The method behind `list`, and its table.
    list: &'static str,
    columns: &'static [Column],
}

/// The table of jobs.
pub(crate) const JOB_COLUMNS: &[Column] = &[
    Column { head: "ID", cell: |row| text(&row["id"]) },
    Column { head: "STATUS", cell: |row| text(&row["status"]) },
    Column { head: "SOURCE", cell: |row| text(&row["source"]) },
    Column { head: "TARGET", cell: |row| text(&row["target"]) },
    Column { head: "DONE", cell: done },
    Column { head: "DIRTY", cell: |row| amount(&row["dirty_bytes"]) },
    Column { head: "RATE", cell: |row| format!("{}/s", amount(&row["copy_bytes_per_second"])) },
    Column { head: "ERROR", cell: |row| text(&row["error"]) },
];

/// The families.
pub(crate) static FAMILIES: [Family; 5] = [
    Family {
        name: "bdev",
        prefix: "bdev_",
        about: "Make, list, resize and delete block devices",
        list: "bdev_get_bdevs",
        columns: &[
            Column { head: "NAME", cell: |row| text(&row["name"]) },
            Column { head: "KIND", cell: |row| text(&row["product_name"]) },
            Column { head: "SIZE", cell: size },
            Column { head: "BLOCK", cell: |row| text(&row["block_size"]) },
            Column { head: "USED BY", cell: |row| sentences(&row["claimed_by"]) },
        ],
    },
    Family {
        name: "bitmap",
        prefix: "bdev_dirty_bitmap_",
        about: "Remember which chunks of a block device are written",
        list: "bdev_dirty_bitmap_get",
        columns: &[
            Column { head: "NAME", cell: |row| text(&row["name"]) },
            Column { head: "DIRTY", cell: |row| amount(&row["count"]) },
            Column { head: "CHUNK", cell: |row| amount(&row["granularity"]) },
            Column { head: "STATE", cell: recording },
            Column { head: "KEPT", cell: |row| text(&row["persistent"]) },
            Column { head: "JOB", cell: |row| text(&row["job_id"]) },
        ],
    },
    Family {
        name: "vhost",
        prefix: "vhost_",
        about: "Serve block devices to virtual machines",
        list: "vhost_get_controllers",
        columns: &[
            Column { head: "NAME", cell: |row| text(&row["ctrlr"]) },
            Column { head: "BDEV", cell: |row| text(&row["backend_specific"]["block"]["bdev"]) },
            Column { head: "ACCESS", cell: access },
            Column { head: "CORES", cell: |row| text(&row["cpumask"]) },
            Column { head: "GUEST", cell: guest },
            Column { head: "SOCKET", cell: |row| text(&row["socket"]) },
        ],
    },
    Family {
        name: "job",
        prefix: "job_",
        about: "Watch and control jobs",
        list: "job_get_list",
        columns: JOB_COLUMNS,
    },
    Family {
        name: "state",
        prefix: "state_",
        about: "See and forget which disks were superseded",
        list: "state_get_records",
        columns: &[
            Column { head: "SUPERSEDED", cell: |row| text(&row["superseded"]["path"]) },
            Column { head: "KNOWN BY", cell: |row| text(&row["superseded"]["known_by"]) },
            Column { head: "BY", cell: |row| text(&row["by"]["path"]) },
            Column { head: "GENERATION", cell: |row| text(&row["generation"]) },
            Column { head: "JOB", cell: |row| text(&row["job_id"]) },
        ],
    },
];

fn recording(row: &Value) -> String {
    let state = match (row["inconsistent"] == true, row["recording"] == true) {
        (true, _) => "inconsistent",
        (false, true) => "recording",
        (false, false) => "disabled",
    };
    state.to_owned()
}

fn access(row: &Value) -> String {
    let read_only = row["backend_specific"]["block"]["readonly"] == true;
    if read_only { "read-only" } else { "read-write" }.to_owned()
}

fn guest(row: &Value) -> String {
    match row["sessions"].get(0) {
        None => "-".to_owned(),
        Some(session) => {
            let queues = session["queues"].as_array().map_or(0, Vec::len);
            format!("connected, {queues} queues")
        }
    }
}

fn size(row: &Value) -> String {
    let blocks = row["num_blocks"].as_u64().unwrap_or(0);
    bytes(blocks.saturating_mul(row["block_size"].as_u64().unwrap_or(0)))
}

fn amount(value: &Value) -> String {
    bytes(value.as_u64().unwrap_or(0))
}

fn done(row: &Value) -> String {
    let (total, dirty) = (row["total_bytes"].as_u64(), row["dirty_bytes"].as_u64());
    let (Some(total), Some(dirty)) = (total.filter(|total| *total > 0), dirty) else {
        return "-".to_owned();
    };
    format!("{}%", u128::from(total.saturating_sub(dirty)) * 100 / u128::from(total))
}

fn sentences(value: &Value) -> String {
    let list: Vec<String> = value.as_array().into_iter().flatten().map(text).collect();
    if list.is_empty() { "-".to_owned() } else { list.join("; ") }
}

impl Family {
    /// The methods of the family.
    fn methods(&self) -> impl Iterator<Item = &'static Method> + '_ {
        METHODS.iter().filter(|method| method.name.starts_with(self.prefix))
    }

    /// A method's verb: what follows the family's name.
    fn verb(&self, method: &Method) -> String {
        method.name.trim_start_matches(self.prefix).replace('_', "-")
    }
}

/// The command of a family.
pub(crate) fn command(family: &Family) -> Command {
    let list = METHODS.iter().find(|method| method.name == family.list);
    let list = list.map(|method| verb_command("list".to_owned(), method));
    let verbs = family.methods().map(|method| verb_command(family.verb(method), method));
    Command::new(family.name)
        .about(family.about)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(list.into_iter().chain(verbs))
}

/// A parameter as the schema describes it.
struct Parameter<'a> {
    name: &'a str,
    schema: &'a Value,
    required: bool,
}

impl Parameter<'_> {
    /// Whether the schema allows this JSON type.
    fn is(&self, kind: &str) -> bool {
        let own = &self.schema["type"];
        own == kind || own.as_array().is_some_and(|kinds| kinds.iter().any(|it| it == kind))
    }

    fn arg(&self) -> Arg {
        let doc = self.schema["description"].as_str().unwrap_or_default().replace('\n', " ");
        let arg = Arg::new(self.name.to_owned()).help(doc);
        if self.required {
            return arg.required(true).value_name(self.name.to_uppercase());
        }
        let arg = arg.long(self.name.replace('_', "-"));
        if self.is("boolean") {
            return arg.action(ArgAction::Set).num_args(0..=1).default_missing_value("true");
        }
        if self.is("array") { arg.action(ArgAction::Append) } else { arg }
    }

    /// What was typed, as the schema wants it. What does not fit goes on as text: the target says what is wrong with it.
    fn value(&self, typed: &str) -> Value {
        if self.is("boolean")
            && let Ok(flag) = typed.parse::<bool>()
        {
            return flag.into();
        }
        if self.is("integer") {
            let number = typed.parse::<u64>().ok();
            let number = number.or_else(|| Some(typed.parse::<bytesize::ByteSize>().ok()?.0));
            return number.map_or_else(|| typed.into(), Value::from);
        }
        typed.into()
    }
}

/// Calls `visit` for each parameter: the required ones first, in the method's order.
fn parameters<T>(method: &Method, mut visit: impl FnMut(&Parameter<'_>) -> T) -> Vec<T> {
    let schema = method.schema();
    let empty = Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    let required: Vec<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let optional = properties.keys().map(String::as_str).filter(|name| !required.contains(name));
    let names = required.iter().copied().chain(optional);
    let found = names.filter_map(|name| {
        let schema = properties.get(name)?;
        Some(visit(&Parameter { name, schema, required: required.contains(&name) }))
    });
    found.collect()
}

fn verb_command(verb: String, method: &'static Method) -> Command {
    let about = method.doc().replace('\n', " ");
    let help = format!("Calls {}. It answers {}.", method.name, method.result);
    Command::new(verb).about(about).after_help(help).args(parameters(method, |it| it.arg()))
}

/// Calls the method that was asked for.
pub(crate) fn run(session: &Session, family: &Family, matches: &ArgMatches) -> anyhow::Result<()> {
    let Some((verb, matches)) = matches.subcommand() else {
        anyhow::bail!("which verb? see resilver {} --help", family.name);
    };
    let listing = verb == "list";
    let mut methods = family.methods();
    let method =
        methods.find(|it| if listing { it.name == family.list } else { family.verb(it) == verb });
    let Some(method) = method else { anyhow::bail!("there is no verb '{verb}'") };
    let mut params = Map::new();
    parameters(method, |parameter| {
        let typed = matches.get_many::<String>(parameter.name).into_iter().flatten();
        let mut values: Vec<Value> = typed.map(|typed| parameter.value(typed)).collect();
        if parameter.is("array") && !values.is_empty() {
            params.insert(parameter.name.to_owned(), values.into());
        } else if let Some(value) = values.pop() {
            params.insert(parameter.name.to_owned(), value);
        }
    });
    let answer = session.connect()?.call(method.name, params.into())?;
    output::warn(answer.warning.as_deref());
    show(session, family, listing, &answer.result);
    Ok(())
}

fn show(session: &Session, family: &Family, listing: bool, result: &Value) {
    match result {
        result if session.json => output::json(result),
        Value::Array(rows) if listing => output::table(family.columns, rows),
        Value::Object(fields) if listing => {
            let rows = fields.values().find_map(Value::as_array);
            output::table(family.columns, rows.map_or(&[], Vec::as_slice));
        }
        // Done, and nothing more to say.
        Value::Bool(true) => {}
        Value::String(name) => output::say(name),
        other => output::json(other),
    }
}
