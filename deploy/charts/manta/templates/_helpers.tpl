{{/* The names of objects begin with this. */}}
{{- define "manta.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What objects of a component are selected by: never to be changed, since a DaemonSet's selector cannot be. */}}
{{- define "manta.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "manta.labels" -}}
{{ include "manta.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "manta.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "manta.serviceAccount" -}}
{{ .root.Values.serviceAccount.name | default (include "manta.name" .root) }}-{{ .component }}
{{- end -}}

{{- define "manta.keeperDirectory" -}}
{{ .Values.mountDir }}/keeper
{{- end -}}

{{/* Which containers ask the API of Kubernetes. */}}
{{- define "manta.daemonAsksApi" -}}
{{- if eq .Values.peers.discovery "kubernetes" }}yes{{ end -}}
{{- end -}}
{{- define "manta.csiAsksApi" -}}
{{- if .Values.csi.events }}yes{{ end -}}
{{- end -}}

{{/* A setting's text. YAML's numbers come as floats, which would print 67108864 as 6.7108864e+07. */}}
{{- define "manta.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{/* What the daemon and the driver must agree on: the control socket's path follows from both. */}}
{{- define "manta.paths" -}}
- name: MANTA_CACHE_DIR
  value: {{ .Values.cache.hostPath | quote }}
- name: MANTA_DAEMON_RUNTIME_DIR
  value: {{ .Values.mountDir | quote }}
{{- end -}}

{{/* The pods' share of both DaemonSets' specs. */}}
{{- define "manta.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
priorityClassName: {{ .Values.priorityClassName | quote }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "manta.podMetadata" -}}
labels:
  {{- include "manta.selector" . | nindent 2 }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
