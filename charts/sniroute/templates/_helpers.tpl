{{- define "sniroute.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "sniroute.fullname" -}}
{{- $name := include "sniroute.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "sniroute.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sniroute.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sniroute.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "sniroute.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "sniroute.image" -}}
{{- with .Values.image }}
{{- if .digest }}
{{- printf "%s@%s" .repository .digest }}
{{- else }}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "sniroute.routesConfigMap" -}}
{{- default (printf "%s-routes" (include "sniroute.fullname" . | trunc 56 | trimSuffix "-")) .Values.routesConfigMap }}
{{- end }}

{{- define "sniroute.metricsAddress" -}}
{{- with .Values.metrics }}
{{- printf (ternary "[%s]:%d" "%s:%d" (contains ":" .host)) .host (int .port) }}
{{- end }}
{{- end }}

{{/* Not empty where the metrics can be reached from outside of the node. */}}
{{- define "sniroute.scraped" -}}
{{- if not (or (hasPrefix "127." .Values.metrics.host) (eq "::1" .Values.metrics.host)) }}yes{{ end }}
{{- end }}

{{/* The kubelet probes the pod's address unless told another: so tell it all but a wildcard. */}}
{{- define "sniroute.probe" -}}
port: metrics
{{- if not (has .Values.metrics.host (list "0.0.0.0" "::")) }}
host: {{ .Values.metrics.host | quote }}
{{- end }}
{{- end }}
