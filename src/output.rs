//! What commands print: tables for people, JSON for programs.

use std::io::Write as _;

use serde_json::Value;

/// Prints a line. A reader that has gone is nobody's error.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Prints JSON.
pub(crate) fn json(value: &Value) {
    say(&format!("{value:#}"));
}

/// Prints an error and what led to it, each cause once: some errors tell theirs in their own sentence.
pub(crate) fn complain(error: &anyhow::Error) {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "resilver: {text}");
}

/// Prints a line of progress.
pub(crate) fn note(line: &str) {
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "{line}");
}

/// Prints what the operator should know although all went well.
pub(crate) fn warn(warning: Option<&str>) {
    if let Some(warning) = warning {
        let mut out = std::io::stderr().lock();
        let _ = writeln!(out, "resilver: warning: {warning}");
    }
}

/// A column of a table: its head, and how a row fills it.
pub(crate) struct Column {
    pub(crate) head: &'static str,
    pub(crate) cell: fn(&Value) -> String,
}

/// Prints a table: columns are as wide as they need to be, the last one is not padded.
pub(crate) fn table(columns: &[Column], rows: &[Value]) {
    for line in table_lines(columns, rows) {
        say(&line);
    }
}

fn table_lines(columns: &[Column], rows: &[Value]) -> Vec<String> {
    let mut cells: Vec<Vec<String>> = vec![columns.iter().map(|it| it.head.to_owned()).collect()];
    cells.extend(rows.iter().map(|row| columns.iter().map(|it| (it.cell)(row)).collect()));
    let width = |column: usize| {
        cells.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns.len()).map(|it| width(it).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let padded = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    cells.iter().map(line).collect()
}

/// A field as a cell: text as it is, nothing for nothing.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other @ (Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            other.to_string()
        }
    }
}

/// A number of bytes as a cell.
pub(crate) fn bytes(value: u64) -> String {
    bytesize::ByteSize(value).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_lines_up() {
        let columns = [
            Column { head: "NAME", cell: |row| text(&row["name"]) },
            Column { head: "N", cell: |row| text(&row["n"]) },
        ];
        let lines =
            table_lines(&columns, &[json!({ "name": "longer", "n": 1 }), json!({ "n": 22 })]);
        assert_eq!(lines, ["NAME    N", "longer  1", "-       22"]);
    }
}
