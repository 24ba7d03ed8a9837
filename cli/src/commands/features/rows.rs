//! Lines of a file as rows of a feature group, each with its line number.

use std::collections::HashMap;
use std::fmt;
use std::io::BufRead;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value as Json;
use spillway_proto::feature::{Key, Row, Value, value::Kind};

use super::Position;

/// A longer line is no row of ours, and would fill memory.
const LONGEST_LINE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Csv,
    JsonLines,
}

/// The columns of a CSV file and where its rows begin.
#[derive(Debug, Default)]
pub struct Header {
    pub bytes: u64,
    columns: Vec<String>,
    format: Option<Format>,
}

pub struct Numbered<T> {
    pub line: u64,
    pub row: T,
}

/// A line that is no row.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub line: u64,
    pub reason: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.reason)
    }
}

impl Format {
    pub fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => Ok(Self::Csv),
            Some("jsonl" | "ndjson") => Ok(Self::JsonLines),
            _ => bail!("{}: expected a file named *.csv or *.jsonl", path.display()),
        }
    }

    /// Reads the header line of a CSV file.
    pub fn header(self, file: &mut impl BufRead) -> Result<Header> {
        if self == Self::JsonLines {
            return Ok(Header { format: Some(self), ..Header::default() });
        }
        let mut line = Vec::new();
        let bytes = read_line(file, &mut line)?;
        let columns = csv_fields(&line)?;
        for required in ["entity", "event_time"] {
            if !columns.iter().any(|column| column == required) {
                bail!("the header line has no column '{required}'");
            }
        }
        Ok(Header { bytes, columns, format: Some(self) })
    }
}

pub struct Reader<R> {
    file: R,
    header: Header,
    at: Position,
    group: String,
    tenant: String,
    line: Vec<u8>,
}

impl<R: BufRead> Reader<R> {
    pub fn new(file: R, header: Header, from: Position, group: String, tenant: String) -> Self {
        let first = Position { byte: header.bytes, line: u64::from(header.bytes > 0) };
        let at = if from.byte > first.byte { from } else { first };
        Self { file, header, at, group, tenant, line: Vec::new() }
    }

    /// After the last line that was read.
    pub fn position(&self) -> Position {
        self.at
    }

    /// The next line that is not empty.
    pub fn next_row(&mut self) -> Result<Option<Result<Numbered<Row>, Refusal>>> {
        loop {
            self.line.clear();
            let bytes = read_line(&mut self.file, &mut self.line)?;
            if bytes == 0 {
                return Ok(None);
            }
            self.at.byte += bytes;
            self.at.line += 1;
            if !self.line.trim_ascii().is_empty() {
                break;
            }
        }
        let line = self.at.line;
        let parsed = match self.header.format {
            Some(Format::JsonLines) => self.json_row(),
            _ => self.csv_row(),
        };
        Ok(Some(match parsed {
            Ok(row) => Ok(Numbered { line, row }),
            Err(error) => Err(Refusal { line, reason: error.to_string() }),
        }))
    }

    fn csv_row(&self) -> Result<Row> {
        let found = csv_fields(&self.line)?;
        if found.len() != self.header.columns.len() {
            bail!("expected {} columns, as in the header line, found {}", self.header.columns.len(), found.len());
        }
        let (mut entity, mut event_time, mut fields) = (None, None, HashMap::new());
        for (column, text) in self.header.columns.iter().zip(found) {
            match column.as_str() {
                "entity" => entity = Some(text),
                "event_time" => event_time = Some(parse_event_time(&text)?),
                // An empty cell is null.
                _ if text.is_empty() => {}
                _ => {
                    fields.insert(column.clone(), Value { kind: Some(Kind::TextValue(text)) });
                }
            }
        }
        self.row(entity, event_time, fields)
    }

    fn json_row(&self) -> Result<Row> {
        let Json::Object(object) = serde_json::from_slice(&self.line)? else { bail!("expected a JSON object") };
        let (mut entity, mut event_time, mut fields) = (None, None, HashMap::new());
        for (name, value) in object {
            match (name.as_str(), value) {
                ("entity", Json::String(text)) => entity = Some(text),
                ("entity", _) => bail!("entity: expected a string"),
                ("event_time", Json::String(text)) => event_time = Some(parse_event_time(&text)?),
                ("event_time", Json::Number(micros)) => event_time = Some(parse_event_time(&micros.to_string())?),
                ("event_time", _) => bail!("event_time: expected RFC 3339 or Unix microseconds"),
                (_, Json::Null) => {}
                (_, value) => {
                    let kind = match value {
                        Json::Bool(value) => Kind::BoolValue(value),
                        // The number as it stands in the file: the group's schema decides what it is.
                        Json::Number(number) => Kind::TextValue(number.to_string()),
                        Json::String(text) => Kind::TextValue(text),
                        _ => bail!("{name}: expected a number, a string, true, false or null"),
                    };
                    fields.insert(name, Value { kind: Some(kind) });
                }
            }
        }
        self.row(entity, event_time, fields)
    }

    fn row(&self, entity: Option<String>, event_time: Option<i64>, fields: HashMap<String, Value>) -> Result<Row> {
        let Some(entity) = entity.filter(|entity| !entity.is_empty()) else { bail!("entity: is missing") };
        let Some(event_time_micros) = event_time else { bail!("event_time: is missing") };
        let key = Key { group: self.group.clone(), entity: entity.into(), tenant: self.tenant.clone() };
        Ok(Row { key: Some(key), event_time_micros, fields })
    }
}

/// Unix microseconds, or RFC 3339.
fn parse_event_time(text: &str) -> Result<i64> {
    if let Ok(micros) = text.parse() {
        return Ok(micros);
    }
    let format = &time::format_description::well_known::Rfc3339;
    let Ok(moment) = time::OffsetDateTime::parse(text, format) else {
        bail!("event_time: expected RFC 3339, such as 2026-01-31T12:00:00Z, or Unix microseconds");
    };
    Ok(i64::try_from(moment.unix_timestamp_nanos() / 1_000)?)
}

/// One line with its end taken off; returns how many bytes it took in the file.
fn read_line(file: &mut impl BufRead, line: &mut Vec<u8>) -> Result<u64> {
    let bytes = std::io::Read::take(&mut *file, LONGEST_LINE).read_until(b'\n', line)? as u64;
    if bytes == LONGEST_LINE && line.last() != Some(&b'\n') {
        bail!("a line is longer than 1 MiB");
    }
    while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
        line.pop();
    }
    Ok(bytes)
}

/// The fields of one line. A quoted field may not span lines: entities and numbers have none.
fn csv_fields(line: &[u8]) -> Result<Vec<String>> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).trim(csv::Trim::All).from_reader(line);
    let mut record = csv::StringRecord::new();
    if !reader.read_record(&mut record)? {
        bail!("the line is empty");
    }
    Ok(record.iter().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, format: Format) -> Vec<Result<(u64, Row), Refusal>> {
        let mut file = text.as_bytes();
        let header = format.header(&mut file).unwrap();
        let mut reader = Reader::new(file, header, Position::default(), "site".into(), String::new());
        let mut rows = Vec::new();
        while let Some(row) = reader.next_row().unwrap() {
            rows.push(row.map(|row| (row.line, row.row)));
        }
        assert_eq!(reader.position().byte, text.len() as u64);
        rows
    }

    #[test]
    fn csv_rows_carry_their_line_and_bad_ones_their_reason() {
        let text = "entity,event_time,age\na,2026-01-01T00:00:00Z,1.5\n\nb,yesterday,1\nc,5\n\"d,1\",7,\n";
        let rows = read(text, Format::Csv);
        let (line, first) = rows[0].as_ref().unwrap();
        assert_eq!((*line, first.event_time_micros), (2, 1_767_225_600_000_000));
        assert_eq!(first.fields["age"].kind, Some(Kind::TextValue("1.5".into())));
        assert_eq!(rows[1].as_ref().unwrap_err().line, 4);
        assert!(rows[2].as_ref().unwrap_err().reason.contains("expected 3 columns"));
        let (_, last) = rows[3].as_ref().unwrap();
        assert_eq!(last.key.as_ref().unwrap().entity, "d,1");
        assert!(last.fields.is_empty(), "an empty cell is null");
    }

    #[test]
    fn json_numbers_keep_their_digits() {
        let text = "{\"entity\":\"a\",\"event_time\":5,\"n\":18446744073709551615,\"ok\":true,\"gone\":null}\nnot json\n[]\n{\"entity\":1}\n";
        let rows = read(text, Format::JsonLines);
        let (_, first) = rows[0].as_ref().unwrap();
        assert_eq!(first.fields["n"].kind, Some(Kind::TextValue("18446744073709551615".into())));
        assert_eq!(first.fields["ok"].kind, Some(Kind::BoolValue(true)));
        assert!(!first.fields.contains_key("gone"));
        assert!(rows[1..].iter().all(Result::is_err));
    }

    #[test]
    fn a_header_without_entity_or_event_time_is_refused() {
        assert!(Format::Csv.header(&mut "entity,age\n".as_bytes()).is_err());
        assert!(Format::of(Path::new("rows.parquet")).is_err());
    }
}
