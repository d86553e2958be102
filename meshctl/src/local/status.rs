//! `meshctl local status`: the state of a lab as tables or JSON.

use std::process::ExitCode;

use anyhow::Result;
use comfy_table::{ContentArrangement, Table, presets};
use lab::status::{PodStatus, Status};
use lab::{client, place};

use super::{Output, Which};
use crate::print::{self, Color};
use crate::waypoint;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How to print it
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    #[command(flatten)]
    which: Which,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let status = client::status(&place::find(args.which.name.as_deref())?)?;
    match args.output {
        Output::Json => print::line(&serde_json::to_string_pretty(&status)?),
        Output::Table => show(&status),
    }
    Ok(ExitCode::SUCCESS)
}

fn show(status: &Status) {
    let colored = print::on_stdout();
    print::line(&format!("lab {:?} of {}\n", status.name, status.dir));
    let nodes = status
        .nodes
        .iter()
        .map(|n| vec![n.name.clone(), n.addresses.join(" "), n.pods.to_string()]);
    section(&["NODE", "ADDRESSES", "PODS"], nodes.collect());
    section(
        &["NAMESPACE", "POD", "READY", "STATE", "RESTARTS", "NODE", "IP", "MESH", "IDENTITY"],
        status.pods.iter().map(|p| pod(p, colored)).collect(),
    );
    let services = status.services.iter().map(|s| {
        let or = |list: &[String], empty: &str| {
            if list.is_empty() { empty.to_owned() } else { list.join(" ") }
        };
        vec![
            s.namespace.clone(),
            s.name.clone(),
            or(&s.addresses, "headless"),
            or(&s.ports, "-"),
            or(&s.endpoints, "none"),
        ]
    });
    section(&["NAMESPACE", "SERVICE", "ADDRESSES", "PORTS", "ENDPOINTS"], services.collect());
    section(&waypoint::show::HEADER, status.waypoints.iter().map(waypoint::show::row).collect());
    let processes = status.processes.iter().map(|p| {
        let ready = if p.ready { "yes" } else { "no" };
        vec![
            p.name.clone(),
            p.node.clone().unwrap_or_default(),
            p.state.clone(),
            ready.to_owned(),
            p.restarts.to_string(),
            p.config.clone().unwrap_or_else(|| "-".to_owned()),
            p.log.clone(),
        ]
    });
    let header = ["PROCESS", "NODE", "STATE", "READY", "RESTARTS", "CONFIG", "LOG"];
    section(&header, processes.collect());
    for p in status.pods.iter().filter(|p| !p.message.is_empty()) {
        print::line(&format!(
            "{} pod {}/{} ({}): {}",
            print::paint("!", Color::Yellow, colored),
            p.namespace,
            p.name,
            p.origin,
            p.message
        ));
    }
    for d in &status.diagnostics {
        print::line(&format!("{} {d}", print::paint("!", Color::Yellow, colored)));
    }
}

fn pod(p: &PodStatus, colored: bool) -> Vec<String> {
    let main = p.containers.iter().filter(|c| !c.init);
    let ready = main.clone().filter(|c| c.ready).count();
    let color = if p.ready || p.state == "Succeeded" { Color::Green } else { Color::Yellow };
    vec![
        p.namespace.clone(),
        p.name.clone(),
        format!("{ready}/{}", main.count()),
        print::paint(&p.state, color, colored),
        p.restarts.to_string(),
        p.node.clone(),
        p.ips.first().cloned().unwrap_or_default(),
        if p.captured { "HBONE" } else { "none" }.to_owned(),
        p.identity.clone().unwrap_or_else(|| "-".to_owned()),
    ]
}

pub(crate) fn section(header: &[&str], rows: Vec<Vec<String>>) {
    if rows.is_empty() {
        return;
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    print::line(&format!("{}\n", table.trim_fmt()));
}
