//! The machine-readable report: everything, with every raw round.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::report::{Entrant, Report, Row, Settings};

#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    settings: &'a Settings,
    contenders: &'a [Entrant],
    summary: &'a [Row],
    rounds: Vec<Named<'a, crate::run::Measurement>>,
    failures: Vec<Named<'a, crate::run::Failure>>,
    interrupted: bool,
}

/// A raw record with the names that its indices stand for.
#[derive(Serialize)]
struct Named<'a, T: Serialize> {
    cell: String,
    contender: &'a str,
    #[serde(flatten)]
    record: &'a T,
}

/// The report as indented JSON.
pub fn render(report: &Report) -> Result<String> {
    let cell = |index: usize| report.cells[index].name();
    let contender = |index: usize| report.entrants[index].label.as_str();
    let results = &report.results;
    let document = Document {
        machine: &report.machine,
        settings: &report.settings,
        contenders: &report.entrants,
        summary: &report.summary,
        rounds: results
            .measurements
            .iter()
            .map(|record| Named {
                cell: cell(record.cell),
                contender: contender(record.contender),
                record,
            })
            .collect(),
        failures: results
            .failures
            .iter()
            .map(|record| Named {
                cell: cell(record.cell),
                contender: contender(record.contender),
                record,
            })
            .collect(),
        interrupted: results.interrupted,
    };
    serde_json::to_string_pretty(&document)
        .map_err(|error| Error::Usage(format!("the report is not JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn all_rounds_are_there_by_name_with_the_machine_and_the_summary() {
        let report = sample::report();
        let value: serde_json::Value = serde_json::from_str(&render(&report).unwrap()).unwrap();
        assert_eq!(value["rounds"].as_array().unwrap().len(), 4 * 3 * 5);
        assert_eq!(value["rounds"][1]["contender"], "diskfuse q4");
        assert_eq!(value["rounds"][1]["cell"], "file aio j1 read seq");
        assert_eq!(value["rounds"][1]["iops"], 75_000.0);
        assert_eq!(value["machine"]["kernel"], "6.18");
        assert_eq!(value["summary"][0]["lines"][0]["to_peer"], 1.5);
        assert_eq!(value["interrupted"], false);
    }

    #[test]
    fn the_floor_the_cost_and_the_tails_are_there() {
        let report = sample::floor_report();
        let value: serde_json::Value = serde_json::from_str(&render(&report).unwrap()).unwrap();
        let row = &value["summary"][0];
        assert_eq!(value["contenders"][3]["role"], "floor");
        assert_eq!(row["best_floor"], "bare-uring q1");
        let line = &row["lines"][1];
        assert_eq!(
            (&line["to_floor"], &line["to_same_floor"]),
            (&0.75.into(), &0.75.into())
        );
        assert_eq!(
            (&line["cpu_us"], &line["p99_to_peer"]),
            (&2.5.into(), &1.5.into())
        );
        assert_eq!(
            (&line["p50_us"], &line["p99_us"], &line["p999_us"]),
            (&100.0.into(), &1200.0.into(), &2400.0.into())
        );
        assert_eq!(value["rounds"][1]["p999_us"], 2400.0);
    }
}
