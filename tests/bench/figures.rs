//! Figures: medians over rounds, a table for people, JSON lines for programs.

use serde::Serialize;

/// One figure: ours beside a peer's, or against a limit of our own.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// Ours.
    pub ours: f64,
    /// The peer's.
    pub peer: Option<f64>,
    /// Ours divided by the peer's.
    pub ratio: Option<f64>,
    /// What ours may be at most, where there is no peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<f64>,
    /// What the ratio may be, where that is promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_limit: Option<RatioLimit>,
    /// Of all.
    pub unit: &'static str,
    /// Who the peer is.
    pub peer_name: Option<String>,
}

/// A bound of a ratio.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLimit {
    /// Not below.
    AtLeast(f64),
    /// Not above.
    AtMost(f64),
}

impl Figure {
    /// The medians of both sides' rounds, which must not be empty.
    pub fn of_rounds(name: &str, unit: &'static str, peer_name: &str, ours: &[f64], peer: &[f64]) -> Self {
        let (ours, peer) = (median(ours), median(peer));
        Self {
            name: name.to_owned(),
            ours,
            peer: Some(peer),
            ratio: Some(ours / peer),
            limit: None,
            ratio_limit: None,
            unit,
            peer_name: Some(peer_name.to_owned()),
        }
    }

    /// With a promise for its ratio.
    pub fn with_ratio(self, limit: RatioLimit) -> Self {
        Self { ratio_limit: Some(limit), ..self }
    }

    /// A figure for the record: without peer or promise.
    pub fn told(name: &str, unit: &'static str, ours: f64) -> Self {
        Self { limit: None, ..Self::within(name, unit, ours, 0.0) }
    }

    /// A figure without a peer.
    pub fn within(name: &str, unit: &'static str, ours: f64, limit: f64) -> Self {
        let limit = Some(limit);
        let (name, ratio_limit) = (name.to_owned(), None);
        Self { name, ours, peer: None, ratio: None, limit, ratio_limit, unit, peer_name: None }
    }
}

/// Prints all, as a table or as one JSON object per line.
pub fn print(figures: &[Figure], json: bool) {
    if json {
        for figure in figures {
            println!("{}", serde_json::to_string(figure).expect("numbers and texts"));
        }
        return;
    }
    let width = figures.iter().map(|figure| figure.name.len()).max().unwrap_or(4).max(4);
    println!("{:<width$}  {:>12}  {:>12}  {:>6}  {:<6}  peer is", "name", "ours", "peer", "ratio", "unit");
    let optional =
        |number: Option<f64>, digits: usize| number.map_or("-".to_owned(), |n| format!("{n:.digits$}"));
    for Figure { name, ours, peer, ratio, limit, ratio_limit, unit, peer_name } in figures {
        // Times and shares are small numbers: two digits for those without a peer.
        let ours = if peer.is_none() { format!("{ours:.2}") } else { format!("{ours:.1}") };
        let (peer, ratio) = (optional(*peer, 1), optional(*ratio, 2));
        let mut beside = peer_name.clone().unwrap_or_else(|| "none".to_owned());
        match (limit, ratio_limit) {
            (Some(limit), _) => beside.push_str(&format!("; at most {limit}")),
            (None, Some(RatioLimit::AtLeast(bound))) => beside.push_str(&format!("; ratio at least {bound}")),
            (None, Some(RatioLimit::AtMost(bound))) => beside.push_str(&format!("; ratio at most {bound}")),
            (None, None) => {}
        }
        println!("{name:<width$}  {ours:>12}  {peer:>12}  {ratio:>6}  {unit:<6}  {beside}");
    }
}

/// The middle of the rounds' figures.
pub fn median(rounds: &[f64]) -> f64 {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        even if even % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

/// The smallest value that `percent` of the values do not exceed.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
    }

    #[test]
    fn the_ratio_is_ours_divided_by_the_peer_s() {
        let figure = Figure::of_rounds("x", "iops", "peer", &[50.0], &[100.0]);
        assert_eq!(figure.ratio, Some(0.5));
    }

    #[test]
    fn a_promised_ratio_is_in_the_json_and_an_unpromised_one_is_not() {
        let figure = Figure::of_rounds("x", "/s", "peer", &[3.0], &[1.0]);
        assert!(serde_json::to_value(&figure).unwrap_or_default().get("ratio_limit").is_none());
        let json = serde_json::to_value(figure.with_ratio(RatioLimit::AtLeast(3.0))).unwrap_or_default();
        assert_eq!(json["ratio_limit"]["at_least"], 3.0);
    }

    #[test]
    fn a_figure_without_a_peer_says_null_and_its_limit() {
        let json = serde_json::to_value(Figure::within("x", "s", 0.5, 1.0)).unwrap_or_default();
        assert_eq!(json["peer"], serde_json::Value::Null);
        assert_eq!(json["limit"], 1.0);
    }

    #[test]
    fn a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert!((percentile(&values, 50) - 50.0).abs() < f64::EPSILON);
        assert!((percentile(&values, 99) - 99.0).abs() < f64::EPSILON);
        assert!((percentile(&[7.0], 99) - 7.0).abs() < f64::EPSILON);
    }
}
